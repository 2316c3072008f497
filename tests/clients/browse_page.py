"""Drives the page of `openvla serve` in headless Chromium. Run by test_pages.py; needs playwright and chromium.

python browse_page.py URL INSTRUCTION OUT.json SCREENSHOT.png [--state "0 0 0"] PICTURE.png …
"""

import argparse
import json

from playwright.sync_api import sync_playwright

arguments = argparse.ArgumentParser()
arguments.add_argument("url")
arguments.add_argument("instruction")
arguments.add_argument("out")
arguments.add_argument("screenshot")
arguments.add_argument("pictures", nargs="+")
arguments.add_argument("--state")
arguments.add_argument("--token")
arguments.add_argument("--unnorm-key")
args = arguments.parse_args()

with sync_playwright() as playwright:
    options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=options)
    page = browser.new_page(viewport={"width": 1000, "height": 1150})
    problems, hosts = [], set()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else "data"))
    page.goto(args.url)
    if args.token:
        page.fill("#token", args.token)
        page.locator("#token").blur()
    page.wait_for_selector("#cameras .camera")
    for place, picture in enumerate(args.pictures):
        page.locator("#cameras input[type=file]").nth(place).set_input_files(picture)
    if args.unnorm_key:
        page.select_option("#key", args.unnorm_key)
        page.wait_for_timeout(300)
    page.fill("#instruction", args.instruction)
    if args.state:
        page.fill("#state", args.state)
    page.click("#ask")
    page.wait_for_selector("#answer:not([hidden])", timeout=60_000)
    rows = page.locator("#actions tr").all()[1:]
    numbers = [[cell.get_attribute("data-value") for cell in row.locator("td").all()] for row in rows]
    shown = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
    names = [row.locator("th").inner_text() for row in rows]
    drawing = page.evaluate(
        "[document.getElementById('drawing').naturalWidth, document.getElementById('drawing').naturalHeight]"
    )
    page.screenshot(path=args.screenshot, full_page=True)
    found = {
        "names": names,
        "numbers": numbers,
        "shown": shown,
        "drawing": drawing,
        "about": page.inner_text("#about"),
    }

    # A camera in place of a file (Chromium's pretended one), then something that is refused
    page.locator("#cameras button").first.click()
    page.wait_for_selector("#cameras video:not([hidden])")
    page.click("#ask")
    page.wait_for_selector("#answer:not([hidden])", timeout=60_000)
    found["camera"] = page.locator("#actions td").first.get_attribute("data-value")
    page.fill("#instruction", "   ")
    page.click("#ask")
    page.wait_for_selector("#problem:not(:empty)")
    found["problem"] = page.inner_text("#problem")
    found["hidden"] = page.locator("#answer").is_hidden()
    browser.close()
json.dump(found | {"problems": problems, "hosts": sorted(hosts)}, open(args.out, "w"))  # noqa: SIM115
