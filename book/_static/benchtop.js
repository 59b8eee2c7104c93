// Names of the theme's controls, so that each contains what is to be seen: search, light and
// dark, folded cells, arrows of the contents.
document.querySelectorAll(".search-button-field").forEach((button) => {
  button.setAttribute("aria-label", button.innerText.replace(/\s+/g, " ").trim() || "Search");
});
document.querySelectorAll(".theme-switch-button").forEach((button) => {
  button.setAttribute("aria-label", "Color mode: Light, Dark, System Settings");
});
document.querySelectorAll("details.hide > summary").forEach((fold) => fold.removeAttribute("aria-label"));
document.querySelectorAll(".bd-sidebar summary").forEach((arrow) => {
  arrow.setAttribute("aria-label", `Pages of ${arrow.closest("li").querySelector("a").textContent.trim()}`);
});

// The atlas: sort by a column, show the rows that fit the fields. Without this script the table is simply whole.
// By hand because the packaged DataTables is an ES module, which browsers refuse to load from file://.
document.querySelectorAll(".bt-atlas").forEach((atlas) => {
  const form = atlas.querySelector("form"), body = atlas.querySelector("tbody"), rows = [...body.rows];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const value = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();

  function choose() {
    const words = form.querySelector("input").value.toLowerCase().split(/\s+/);
    const wanted = [...form.querySelectorAll("select")].filter((field) => field.value);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(words.every((word) => texts.get(row).includes(word)) &&
        wanted.every((field) => row.dataset[field.name] === field.value));
      shown += !row.hidden;
    }
    form.querySelector(".bt-count").textContent = `${shown} of ${rows.length} papers`;
  }

  function sort(column, head) {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    atlas.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const empty = (text) => (text === "" || text === "1e9" ? 1 : 0);  // rows without a value stay below, either way
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      return empty(x) - empty(y) || down * x.localeCompare(y, "en", { numeric: true });
    });
    body.append(...rows);
  }

  atlas.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(column, head));
    head.replaceChildren(button);
  });
  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  choose();
});
