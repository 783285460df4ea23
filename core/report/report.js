// Draws every figure where it stands in the page, and fits them to the paper for printing.
const PRINT_WIDTH = 680; // A4 between its margins, in CSS pixels
const figures = [...document.querySelectorAll("script.figure")];
const plots = figures.map(spec => {
  const {data, layout} = JSON.parse(spec.textContent), place = spec.previousElementSibling;
  Plotly.newPlot(place, data, layout, {responsive: true, displaylogo: false,
    toImageButtonOptions: {scale: 3}});
  return place;
});
const fit = width => plots.forEach(p => Plotly.relayout(p, {width, autosize: !width}));
addEventListener("beforeprint", () => {
  fit(PRINT_WIDTH);
  document.querySelectorAll("details").forEach(d => { d.open = true; });
});
addEventListener("afterprint", () => fit(null));
