"""Drives the Space's page in headless Chromium. Run by test_pages.py; needs playwright and chromium.

python browse_gradio.py URL INSTRUCTION OUT.json SCREENSHOT.png PICTURE.png
"""

import json
import sys

from playwright.sync_api import sync_playwright

url, instruction, out, screenshot, picture = sys.argv[1:6]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 1100})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.wait_for_selector("input[type=file]", state="attached", timeout=60_000)
    page.locator("input[type=file]").first.set_input_files(picture)
    page.get_by_label("instruction").first.fill(instruction)
    page.wait_for_selector("img", timeout=60_000)
    page.get_by_role("button", name="act", exact=True).click()
    cells = page.get_by_role("gridcell")
    cells.nth(20).wait_for(timeout=60_000)  # seven dims: name, unit, value
    texts = [cell.inner_text().strip() for cell in cells.all()]
    rows = [texts[start : start + 3] for start in range(0, len(texts), 3)]
    page.screenshot(path=screenshot, full_page=True)
    browser.close()
json.dump({"rows": rows, "problems": problems}, open(out, "w"))  # noqa: SIM115
