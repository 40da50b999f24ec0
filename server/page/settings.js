// Settings, the API key and the theme. Settings and theme are kept in this browser, the key in this tab only.

import { onKeyWanted } from "./api.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "tokens"];

export function settings() {
  const given = Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()]));
  return { ...given, lossless: $("lossless").checked };
}

for (const name of FIELDS) {
  $(name).value = localStorage.getItem(name) ?? "";
  $(name).addEventListener("change", () => localStorage.setItem(name, $(name).value));
}
$("lossless").checked = localStorage.getItem("lossless") === "true";
$("lossless").addEventListener("change", () => localStorage.setItem("lossless", $("lossless").checked));
$("open-settings").addEventListener("click", () => $("settings").showModal());

// Two calls that are refused at once ask once.
let asking = null;

onKeyWanted((tried) => {
  asking ??= new Promise((given, refused) => {
    const dialog = $("ask-key");
    $("key").value = "";
    const why = tried ? "The server did not take that key." : "This server wants a key.";
    $("key-note").textContent = `${why} It stays in this tab and is forgotten with it.`;
    dialog.onclose = () => {
      asking = null;
      if (!dialog.returnValue) return refused(new Error("The server wants an API key."));
      sessionStorage.setItem("key", $("key").value.trim());
      given();
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
});

const dark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
}

$("theme").addEventListener("click", () => {
  const now = localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
  localStorage.setItem("theme", now === "dark" ? "light" : "dark");
  showTheme();
});
showTheme();
