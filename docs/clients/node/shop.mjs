// Publishes to Grapnel and follows what becomes of it: node shop.mjs ADDRESS NAMESPACE CHECKOUT
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address, namespace, checkout] = process.argv.slice(2);
const parent = `namespaces/${namespace}`;
const definition = loadSync(
  ["grapnel/v1/event.proto", "grapnel/v1/delivery.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [join(checkout, "proto")], keepCase: true, longs: String, enums: String, defaults: true },
);
const { v1 } = grpc.loadPackageDefinition(definition).grapnel;
const options = {
  "grpc.service_config": readFileSync(join(checkout, "sdk/client/service_config.json"), "utf8"),
  "grpc.keepalive_time_ms": 30_000, // below 20 s the server hangs up
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.max_receive_message_length": 8 << 20,
};
const { UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, INTERNAL, UNKNOWN } = grpc.status;
const unknown = [UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, INTERNAL, UNKNOWN];

/** What a server says beside OK, or that there was no answer. */
class GrapnelError extends Error {
  constructor(error) {
    super(error.details, { cause: error });
    Object.assign(this, { code: error.code, reason: "", violations: [], retryAfter: undefined });
    for (const bytes of error.metadata?.get("grpc-status-details-bin") ?? [])
      for (const detail of definition["google.rpc.Status"].deserialize(bytes).details) this.#add(detail);
  }

  #add({ type_url, value }) {
    const type = type_url.split("/").pop();
    const detail = definition[type]?.deserialize(value);
    if (type === "google.rpc.ErrorInfo") this.reason = detail.reason;
    if (type === "google.rpc.BadRequest") this.violations = detail.field_violations;
    if (type === "google.rpc.RetryInfo") this.retryAfter = milliseconds(detail.retry_delay);
  }

  /** Milliseconds until the same call, with the same ids, may be made again; undefined when that is of no use. */
  wait(attempt) {
    const backoff = Math.min(100 * 2 ** attempt, 3000) * (0.75 + Math.random() / 2);
    if (this.retryAfter !== undefined) return Math.max(this.retryAfter, backoff);
    return unknown.includes(this.code) ? backoff : undefined;
  }
}

function milliseconds(duration) {
  return duration ? Number(duration.seconds) * 1000 + duration.nanos / 1e6 : 0;
}

/** Makes an idempotent call until it is answered for good, for at most timeout milliseconds. */
async function call(client, method, request, timeout = 60_000) {
  const end = Date.now() + timeout;
  for (let attempt = 0; ; attempt++) {
    try {
      const deadline = Math.min(Date.now() + 10_000, end);
      return await new Promise((resolve, reject) =>
        client[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer))));
    } catch (error) {
      const failure = new GrapnelError(error);
      const wait = failure.wait(attempt);
      if (wait === undefined || Date.now() + wait > end) throw failure;
      await sleep(wait);
    }
  }
}

/** An event with an id: without one a repeated publish could be stored twice. */
function newEvent(type, body, id = randomUUID()) {
  return { id, type, data: Buffer.from(JSON.stringify(body)), data_content_type: "application/json" };
}

const publish = (client, event) => call(client, "Publish", { parent, event });

/** Publishes up to 500 events and 4 MiB, each on its own; returns the refusals by event id. */
async function publishBatch(client, events, timeout = 60_000) {
  const end = Date.now() + timeout;
  const refused = new Map();
  for (let attempt = 0; events.length > 0; attempt++) {
    const { results } = await call(client, "BatchPublish", { parent, events });
    if (results.length !== events.length) throw new Error("the server did not answer every event");
    const again = [];
    let wait = 0;
    results.forEach(({ error }, k) => {
      if (!error) return;
      if (error.retryable && Date.now() < end) {
        again.push(events[k]);
        wait = Math.max(wait, milliseconds(error.retry_delay), Math.min(100 * 2 ** attempt, 3000));
      } else refused.set(events[k].id, `${error.message} (${error.reason})`);
    });
    events = again;
    await sleep(wait);
  }
  return refused;
}

/** All pages; a page may be empty and not the last. */
async function* deliveries(client, filter) {
  let page_token = "";
  do {
    const page = await call(client, "ListDeliveries", { parent, filter, page_size: 200, page_token });
    yield* page.deliveries;
    page_token = page.next_page_token;
  } while (page_token);
}

const ended = ({ state }) => !["STATE_PENDING", "STATE_SCHEDULED", "STATE_IN_FLIGHT"].includes(state);

const credentials = grpc.credentials.createInsecure(); // createSsl() for TLS
const publisher = new v1.PublishService(address, credentials, options);
const reader = new v1.DeliveryService(address, credentials, options);

const stored = await publish(publisher, newEvent("order.created", { order: 1001 }, "o-1001-created"));
console.log("stored", stored.name, "webhook-id", stored.uid);
const again = await publish(publisher, newEvent("order.created", { order: 1001 }, "o-1001-created"));
console.log("again", again.name, "duplicate", again.duplicate);

const events = [1, 2, 3].map((n) => newEvent("order.paid", { order: n }, `o-${n}-paid`));
events.push(newEvent("", {}, "o-4-paid")); // no type: refused, and alone
for (const [id, why] of await publishBatch(publisher, events)) console.log("refused", id, why);

try {
  await publish(publisher, newEvent("order.created", { order: 1002 }, "o-1001-created"));
} catch (error) {
  console.log("error", grpc.status[error.code], error.reason);
}

for await (let delivery of deliveries(reader, `event = "${stored.name}"`)) {
  while (!ended(delivery)) {
    await sleep(100);
    ({ delivery } = await call(reader, "GetDelivery", { name: delivery.name }));
  }
  console.log("delivery", delivery.state, "after", delivery.attempt_count, "attempts");
}
publisher.close();
reader.close();
