// The page of `openvla serve`: pictures from files or cameras and an instruction go to /act, its action is shown.
"use strict";

const find = (id) => document.getElementById(id);
let policy = null;

function headers() {
  const token = find("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function tell(problem) {
  find("problem").textContent = problem;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error || `The server answered ${answer.status}.`);
  return content;
}

// --- What the policy takes -------------------------------------------------------------------------------------------
async function describe() {
  const chosen = find("key").value;
  try {
    policy = await ask(`/metadata${chosen ? `?unnorm_key=${encodeURIComponent(chosen)}` : ""}`);
  } catch (error) {
    find("about").textContent = "The policy is not known yet.";
    tell(error.message);
    return;
  }
  tell("");
  const names = policy.action_dims.map((dim) => dim.name).join(", ");
  const steps = policy.action_chunk > 1 ? `, ${policy.action_chunk} steps at a time` : "";
  const checkpoint = policy.checkpoint && policy.checkpoint !== "." ? policy.checkpoint : "A policy";
  find("about").textContent = `${checkpoint}: ${names}${steps}`;
  if (!find("key").length) {
    policy.unnorm_keys.forEach((key) => find("key").add(new Option(key)));
    find("key").value = policy.unnorm_key;
  }
  find("state-row").hidden = !policy.proprio_dim;
  const named = policy.proprio_names ? policy.proprio_names.join(" ") : `${policy.proprio_dim} numbers`;
  find("state").placeholder = named;
  if (find("cameras").children.length !== policy.num_cameras) addCameras();
}

function addCameras() {
  find("cameras").replaceChildren();
  for (let index = 0; index < policy.num_cameras; index += 1) {
    const name = policy.cameras ? policy.cameras[index].split(".").pop() : `camera ${index + 1}`;
    find("cameras").append(makeCamera(name));
  }
}

function makeCamera(name) {
  const box = document.createElement("div");
  box.className = "camera";
  const label = document.createElement("label");
  label.append(`Picture: ${name}`);
  const file = document.createElement("input");
  Object.assign(file, { type: "file", accept: "image/png,image/jpeg,image/webp" });
  label.append(file);
  const image = document.createElement("img");
  Object.assign(image, { hidden: true, alt: name });
  const video = document.createElement("video");
  Object.assign(video, { hidden: true, muted: true, playsInline: true });
  const live = document.createElement("button");
  Object.assign(live, { type: "button", textContent: "Use a camera" });
  live.hidden = !navigator.mediaDevices;
  file.addEventListener("change", () => {
    stop(video, live);
    image.hidden = !file.files.length;
    if (file.files.length) image.src = URL.createObjectURL(file.files[0]);
  });
  live.addEventListener("click", async () => {
    if (video.srcObject) return stop(video, live);
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    } catch (error) {
      return tell(`No camera: ${error.message}`);
    }
    await video.play();
    Object.assign(file, { value: "" });
    image.hidden = true;
    video.hidden = false;
    live.textContent = "Stop the camera";
  });
  box.append(label, live, image, video);
  box.picture = () => (video.srcObject ? grab(video) : file.files.length ? read(file.files[0]) : null);
  return box;
}

function stop(video, live) {
  if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
  Object.assign(video, { srcObject: null, hidden: true });
  live.textContent = "Use a camera";
}

// --- Pictures as base64 ----------------------------------------------------------------------------------------------
function grab(video) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return canvas.toDataURL("image/png");
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

// --- The answer ------------------------------------------------------------------------------------------------------
function number(value) {
  return Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.0001) ? value.toExponential(3) : value.toFixed(4);
}

function show(answer, milliseconds) {
  find("drawing").src = `data:image/png;base64,${answer.drawing}`;
  const table = find("actions");
  table.replaceChildren();
  const head = table.insertRow();
  ["", ...answer.actions.map((_, step) => (answer.actions.length > 1 ? `step ${step + 1}` : "action"))].forEach((text) => {
    head.append(Object.assign(document.createElement("th"), { textContent: text }));
  });
  answer.dims.forEach((dim, index) => {
    const row = table.insertRow();
    const unit = dim.unit ? ` (${dim.unit})` : "";
    row.append(Object.assign(document.createElement("th"), { textContent: dim.name + unit }));
    answer.actions.forEach((action) => {
      const cell = row.insertCell();
      cell.textContent = number(action[index]);
      cell.title = cell.dataset.value = String(action[index]);
    });
  });
  const clamped = (answer.clamped || []).map((each) => `${each.dim} from ${number(each.wanted)} to ${number(each.bound)}`);
  find("timing").textContent =
    `${milliseconds.toFixed(0)} ms for the round trip, ${answer.timing.infer_ms.toFixed(0)} of them in the policy. ` +
    (clamped.length ? `Clamped: ${clamped.join(", ")}.` : "");
  find("answer").hidden = false;
}

find("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!policy) await describe();
  if (!policy) return;
  tell("");
  find("answer").hidden = true;
  find("ask").disabled = true;
  try {
    const images = await Promise.all([...find("cameras").children].map((box) => box.picture()));
    if (images.includes(null)) throw new Error("A picture is missing.");
    const request = { images, instruction: find("instruction").value, unnorm_key: find("key").value, draw: true };
    if (policy.proprio_dim) {
      request.state = find("state").value.split(/[\s,]+/).filter(Boolean).map(Number);
      if (request.state.some(Number.isNaN)) throw new Error("The state of the robot: numbers, with blanks between them.");
    }
    const start = performance.now();
    const answer = await ask("/act", { method: "POST", body: JSON.stringify(request) });
    show(answer, performance.now() - start);
  } catch (error) {
    tell(error.message);
  } finally {
    find("ask").disabled = false;
  }
});
find("key").addEventListener("change", describe);
find("token").addEventListener("change", describe);
describe();
