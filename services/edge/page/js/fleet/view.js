// The state of the server, for people who run it.

import { html, useEffect, useState } from "../../vendor/preact.js";
import { count } from "../format.js";
import { SidebarToggle } from "../sidebar.js";
import { update } from "../store.js";
import { addStyle } from "../style.js";
import { clock } from "./format.js";
import { Failures, History, Problems, Tiles, Workers } from "./parts.js";
import { Plots } from "./plots.js";
import { watch } from "./poll.js";

await Promise.all(["../vendor/uplot/uplot.css", "../css/fleet.css"].map(addStyle));

export function FleetView() {
  const [seen, setSeen] = useState({ snapshot: null });
  useEffect(() => watch((snapshot) => setSeen({ snapshot })), []); // a new object, to render
  const { snapshot } = seen;
  return html`<header class="head">
      <${SidebarToggle} />
      <h1>State of the server</h1>
      ${snapshot && html`<${Freshness} snapshot=${snapshot} />`}
    </header>
    <div class="fleet" tabindex="0" role="region" aria-label="Figures">
      <div class="fleet-body">
        ${snapshot ? html`<${Body} snapshot=${snapshot} />` : html`<p class="hint">Loading…</p>`}
      </div>
    </div>`;
}

function Freshness({ snapshot: { isStale, fleetAt } }) {
  if (!isStale) return html`<span class="tag"><i class="live-dot" aria-hidden="true"></i>Live</span>`;
  return html`<span class="tag">${fleetAt ? `Last seen ${clock(fleetAt)}` : "Not live"}</span>`;
}

function Body({ snapshot }) {
  const { fleet, isStale, needsKey } = snapshot;
  return html`<${Problems} snapshot=${snapshot} />
    ${needsKey && html`<${KeyButton} text="Enter a key" />`}
    ${fleet &&
    html`<div class="figures" data-stale=${isStale}>
      <${Tiles} snapshot=${snapshot} />
      ${fleet.workers && html`<${Details} snapshot=${snapshot} />`}
      ${!fleet.workers && fleet.key && html`<${OwnUse} usage=${fleet.key} />`}
      <p class="hint">FineTuneLLM ${fleet.version}</p>
    </div>`}`;
}

// What only admins see.
function Details({ snapshot }) {
  const { fleet, activity, failures, error } = snapshot;
  return html`${activity &&
    html`<section>
      <h2>Last ten minutes</h2>
      <${Plots} key=${activity.edge_id} activity=${activity} isLive=${error === null} />
      <${Edges} snapshot=${snapshot} />
    </section>`}
    ${fleet.nats_connected &&
    html`<section>
        <h2>Workers</h2>
        <${Workers} workers=${fleet.workers} />
      </section>
      <section>
        <h2>History</h2>
        <${History} history=${fleet.history} isConnected=${fleet.database_connected} />
      </section>`}
    ${activity &&
    html`<section>
      <h2>Recent failures</h2>
      <${Failures} failures=${failures} now=${activity.now} />
    </section>`}`;
}

function Edges({ snapshot: { edges, edgeId } }) {
  if (edges.size < 2) return null;
  return html`<p class="hint">
    ${count(edges.size)} edges reply in turn. The time to first token is that of requests to edge
    ${" "}${edgeId}; failures are those of all that have replied.
  </p>`;
}

function OwnUse({ usage }) {
  const rows = [
    ["Running answers", usage.running, usage.parallel],
    ["Requests in the last minute", usage.requests, usage.requests_per_minute],
    ["Tokens in the last minute", usage.tokens, usage.tokens_per_minute],
  ];
  return html`<section>
    <h2>Your key, ${usage.name}</h2>
    <dl class="history">
      ${rows.map(
        ([name, used, limit]) => html`<div key=${name}>
          <dt>${name}</dt>
          <dd>
            <b>${limit === null ? "–" : count(used)}</b>
            <span class="hint"> ${limit === null ? "not limited, so not counted" : `of ${count(limit)}`}</span>
          </dd>
        </div>`,
      )}
    </dl>
    <p class="note">
      Workers, plots and failures show what all keys do. They need the key of an admin:${" "}
      <code>keys add NAME --admin</code>.
    </p>
    <${KeyButton} text="Enter another key" />
  </section>`;
}

function KeyButton({ text }) {
  return html`<button type="button" class="quiet"
    onClick=${() => update({ dialog: { name: "key", text: "" } })}>${text}</button>`;
}
