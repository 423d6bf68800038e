"use strict";
// Sort a table by a column: a click on its heading, or Enter on it. Numbers go by the number behind a cell, largest
// first; words by the alphabet. Dashes stay at the end. The third click restores the order of the page.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const isNumber = heading.classList.contains("n");
    const orders = isNumber ? ["descending", "ascending"] : ["ascending", "descending"];
    heading.querySelector("button").addEventListener("click", () => {
      const order = orders[orders.indexOf(heading.getAttribute("aria-sort")) + 1] || "none";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", order);
      const key = (row) => {
        const cell = row.cells[column];
        return isNumber ? cell.dataset.value && Number(cell.dataset.value) : (cell.firstChild ? cell.firstChild.textContent : "");
      };
      const sign = order === "descending" ? -1 : 1;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const [noX, noY] = [x === undefined || x === "\u2013", y === undefined || y === "\u2013"];
        if (noX || noY) return noX - noY;
        return sign * (isNumber ? x - y : x.localeCompare(y));
      };
      body.append(...(order === "none" ? original : [...original].sort(compare)));
    });
  });
}
