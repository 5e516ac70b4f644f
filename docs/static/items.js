// On a page of items: the number that was clicked on chooses the scores by which the items below are
// filtered and sorted. Without this script all of them stand there in their order.
(() => {
  const table = document.querySelector("table.items");
  const numbers = [...document.querySelectorAll(".items-numbers a[data-metric]")];
  if (!table || !numbers.length) return;
  const rows = [...table.tBodies[0].rows];
  const choice = (label, options) => {
    const select = Object.assign(document.createElement("select"), { name: label });
    select.append(...options.map(([value, text]) => new Option(text, value)));
    const around = document.createElement("label");
    around.append(label + " ", select);
    bar.append(around, " ");
    select.addEventListener("change", show);
    return select;
  };
  const bar = document.createElement("div"), said = document.createElement("output");
  bar.className = "items-bar";
  const name = a => `${a.closest("tr").cells[0].textContent}, ` +
    document.querySelector(".items-numbers thead tr").cells[a.parentElement.cellIndex].textContent;
  const number = choice("number", numbers.map(a => [a.id, `${name(a)}: ${a.textContent}`]));
  const shown = choice("show", [["all", "all"], ["wrong", "wrong"], ["right", "right"]]);
  const order = choice("order", [["number", "as asked"], ["worst", "worst first"]]);
  // texts are neither right nor wrong
  shown.parentElement.hidden = [...table.querySelectorAll("li")].some(li => li.dataset.weight !== "1.0");
  bar.append(said);
  table.parentElement.before(bar);

  function score(row, a) {
    const cell = [...row.cells].find(cell => cell.dataset.stage === a.dataset.stage);
    const line = cell && [...cell.querySelectorAll("li")].find(li => li.dataset.metric === a.dataset.metric);
    return line && (!a.dataset.group || line.dataset.group === a.dataset.group) ? line : null;
  }

  function show() {
    const a = document.getElementById(number.value), best = +a.dataset.best;
    let value = 0, weight = 0, count = 0;
    const found = rows.map((row, place) => ({ row, place, line: score(row, a) }));
    for (const old of table.querySelectorAll("li.chosen")) old.classList.remove("chosen");
    for (const { row, line } of found) {
      const right = line && +line.dataset.value === best;
      row.hidden = !line || shown.value === "wrong" && right || shown.value === "right" && !right;
      if (line) line.classList.add("chosen");
      if (row.hidden) continue;
      const behind = line.closest("details");
      if (behind) behind.open = true;
      value += +line.dataset.value; weight += +line.dataset.weight; count += 1;
    }
    const badness = ({ line }) => line ? (best ? -1 : 1) * line.dataset.value / line.dataset.weight : -Infinity;
    found.sort((x, y) => order.value === "worst" ? badness(y) - badness(x) || x.place - y.place : x.place - y.place);
    table.tBodies[0].append(...found.map(one => one.row));
    said.textContent = `${count} of ${rows.length} items` + (count ? `, mean ${(value / weight).toFixed(3)}` : "");
  }

  function asked() {
    const id = decodeURIComponent(location.hash.slice(1));
    if (numbers.some(a => a.id === id)) number.value = id;
    show();
  }
  addEventListener("hashchange", asked);
  asked();
})();
