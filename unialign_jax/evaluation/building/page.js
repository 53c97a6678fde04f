// The script of a review page: keeps what is filled in, in this browser, and saves it as the filled-in sheet.
"use strict";

// The CSV file of a sheet. columns: its names; rows: the columns that are given; filled: {item: {decision, text, reason}}.
function sheetText(columns, rows, filled, editor) {
  const quoted = (value) => (/[",\r\n]/.test(value) ? '"' + value.replaceAll('"', '""') + '"' : value);
  const lines = rows.map((row) => {
    const own = filled[row.item] || {};
    const values = { ...row, ...own, editor: own.decision ? editor : "" };
    return columns.map((name) => quoted(values[name] || "")).join(",");
  });
  return "\ufeff" + [columns.join(","), ...lines].map((line) => line + "\r\n").join("");
}

function main() {
  const { columns, rows, sheet } = JSON.parse(document.getElementById("sheet").textContent);
  const editor = document.getElementById("editor");
  const filled = JSON.parse(localStorage.getItem(sheet) || "{}");
  editor.value = localStorage.getItem("editor") || "";
  const count = () => {
    const done = rows.filter((row) => (filled[row.item] || {}).decision).length;
    document.getElementById("count").textContent = done + " of " + rows.length;
  };
  for (const line of document.querySelectorAll("tr[data-item]")) {
    const item = line.dataset.item;
    for (const field of line.querySelectorAll("[name]")) {
      field.value = (filled[item] || {})[field.name] || "";
      field.addEventListener("change", () => {
        filled[item] = { ...filled[item], [field.name]: field.value };
        localStorage.setItem(sheet, JSON.stringify(filled));
        count();
      });
    }
  }
  editor.addEventListener("change", () => localStorage.setItem("editor", editor.value));
  document.getElementById("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([sheetText(columns, rows, filled, editor.value)], { type: "text/csv" }));
    link.download = sheet.replace(".csv", "-reviewed.csv");
    link.click();
  });
  count();
}

if (typeof document !== "undefined") main();
