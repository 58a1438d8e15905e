// Small plots of the last ten minutes.

import uPlot from "../../vendor/uplot/uplot.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../../vendor/preact.js";
import { clock, duration, rate, whole } from "./format.js";

const WINDOW = 600; // seconds
const HEIGHT = 132; // pixels
const WHOLE_STEPS = [1, 2, 5].flatMap((step) => [0, 1, 2, 3, 4, 5].map((power) => step * 10 ** power)).sort(
  (one, other) => one - other,
);
const FONT = "12px system-ui, sans-serif";

// Of each plot: the columns of the samples that it shows, and how their values read, also at the
// axis. `least` is the least upper end of the axis.
const PLOTS = [
  {
    title: "Generated tokens per second",
    series: [{ name: "all workers", column: "generated_per_second" }],
    format: rate,
    ticks: whole,
    least: 10,
  },
  {
    title: "Prompt tokens per second",
    series: [{ name: "all workers, without cached ones", column: "prefilled_per_second" }],
    format: rate,
    ticks: whole,
    least: 10,
  },
  {
    title: "Requests",
    series: [
      { name: "running", column: "running" },
      { name: "waiting", column: "waiting" },
      // a limit: it is seen once the others come near to it
      { name: "slots", column: "slots", dash: [4, 4], auto: false },
    ],
    format: whole,
    ticks: whole,
    least: 9,
  },
  {
    title: "Time to first token",
    series: [
      { name: "median", column: "ttft_p50" },
      { name: "95th percentile", column: "ttft_p95" },
    ],
    format: duration,
    ticks: duration,
    least: 0.2,
  },
];

export function Plots({ activity, isLive }) {
  // the sample under the pointer, in all plots at once
  const [index, setIndex] = useState(null);
  return html`<div class="plots">
    ${PLOTS.map(
      (plot) => html`<${Plot} key=${plot.title} plot=${plot} activity=${activity} index=${index}
        isLive=${isLive} onPoint=${setIndex} />`,
    )}
  </div>`;
}

function Plot({ plot, activity, index, isLive, onPoint }) {
  const frame = useRef(null);
  const chart = useRef(null);
  const { samples, now } = activity;
  const columns = plot.series.map(({ column }) => samples[column]);
  const at = index ?? samples.at.length - 1;
  const time = at >= 0 ? clock(samples.at[at] * 1000) : "";

  useLayoutEffect(() => {
    chart.current = draw(frame.current, plot, onPoint);
    const stopWatching = watchLooks(frame.current, chart.current);
    return () => {
      stopWatching();
      chart.current.destroy();
    };
  }, []);
  useEffect(() => {
    chart.current.now = now;
    chart.current.setData([samples.at, ...columns]);
  }, [activity]);

  return html`<figure class="plot">
    <figcaption>
      <span class="plot-head">
        <span class="plot-title">${plot.title}</span>
        <span class="plot-time">${index === null && isLive ? "now" : time}</span>
      </span>
      <span class="plot-values">
        ${plot.series.map(
          ({ name }, number) => html`<span key=${name} class="plot-value">
            <i data-series=${number} aria-hidden="true"></i>
            ${name} <b>${plot.format(columns[number][at])}</b>
          </span>`,
        )}
      </span>
      <span class="for-readers">${summary(plot, columns)}</span>
    </figcaption>
    <div class="canvas" ref=${frame} aria-hidden="true"></div>
  </figure>`;
}

// Return in a sentence what the lines show.
function summary(plot, columns) {
  const parts = plot.series.map(({ name }, number) => {
    const known = columns[number].filter((value) => value !== null);
    if (!known.length) return `${name}: no figures`;
    const [least, most] = [Math.min(...known), Math.max(...known)].map(plot.format);
    return `${name}: ${least === most ? `always ${least}` : `between ${least} and ${most}`}`;
  });
  return `In the last ten minutes, ${parts.join("; ")}.`;
}

function draw(frame, plot, onPoint) {
  const colour = (selector) => getComputedStyle(frame.parentElement.querySelector(selector)).color;
  const muted = () => getComputedStyle(frame).color;
  const grid = () => getComputedStyle(frame).borderTopColor;
  const axis = { stroke: muted, font: FONT, ticks: { show: false } };
  const chart = new uPlot(
    {
      width: frame.clientWidth,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        sync: { key: "fleet" },
        points: { size: 7 },
      },
      scales: {
        x: { range: (self) => [(self.now ?? 0) - WINDOW, self.now ?? 0] },
        y: { range: (self, min, max) => [0, Math.max(plot.least, (max ?? 0) * 1.1)] },
      },
      axes: [
        { ...axis, size: 24, space: 70, grid: { show: false }, values: times },
        {
          ...axis,
          size: 54,
          space: 36,
          ...(plot.ticks === whole && { incrs: WHOLE_STEPS }),
          grid: { stroke: grid, width: 1 },
          values: (self, values) => values.map(plot.ticks),
        },
      ],
      series: [
        {},
        ...plot.series.map((each, number) => ({
          stroke: () => colour(`[data-series="${number}"]`),
          fill: number === 0 ? () => faint(colour(`[data-series="0"]`)) : undefined,
          dash: each.dash,
          auto: each.auto ?? true,
          width: each.dash ? 1 : 1.75,
          points: { show: (self, series, from, to) => to - from < 2 },
        })),
      ],
      hooks: { setCursor: [(self) => onPoint(self.cursor.idx ?? null)] },
    },
    [[], ...plot.series.map(() => [])],
    frame,
  );
  return chart;
}

// Return a colour, as computed by the browser, that lets the grid through.
function faint(rgb) {
  return rgb.replace("rgb(", "rgba(").replace(")", ", 0.1)");
}

function times(self, values) {
  return values.map((value) => clock(value * 1000).slice(0, 5));
}

// Draw again when the width or the colours change.
function watchLooks(frame, chart) {
  const width = new ResizeObserver(() => chart.setSize({ width: frame.clientWidth, height: HEIGHT }));
  width.observe(frame);
  const again = () => chart.redraw();
  const theme = new MutationObserver(again);
  theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", again);
  return () => {
    width.disconnect();
    theme.disconnect();
    dark.removeEventListener("change", again);
  };
}
