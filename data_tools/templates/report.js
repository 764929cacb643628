const field = document.getElementById("find");
const found = document.getElementById("found");
const cards = [...document.querySelectorAll(".card")];
field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    card.hidden = wanted !== "" && !card.dataset.search.includes(wanted);
    count += card.hidden ? 0 : 1;
  }
  for (const sheet of document.querySelectorAll(".sheet")) {
    sheet.hidden = !sheet.querySelector(".card:not([hidden])");
  }
  found.hidden = wanted === "";
  found.textContent = `${count} of ${cards.length} pictures`;
});
