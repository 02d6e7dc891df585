// Grapnel's plugin protocol for JavaScript: a signer, a transport or a transformer is one function.
//
// It needs @grpc/grpc-js, @grpc/proto-loader and the file plugin.proto beside it, which is
// grapnel.plugin.v1. Copy both into your project; they change only with the protocol.
//
//     const plugin = new Plugin("acme/sign", "1.0.0");
//
//     plugin.signer("acme-v2", { emits: ["acme-signature"], secrets: [{ name: "key", required: true }] },
//       ({ secrets }) => (request) => request.set("acme-signature", mac(secrets.key[0], request.body)));
//
//     plugin.main();
//
// The outer function is called once for each configured instance, and when a config is only checked; the inner one
// for each request. A signer is pure and synchronous: it takes the time from request.created and randomness from
// request.nonce. A transport returns a promise of { status, headers, body, peer }. A transformer is given an Event and
// returns { body, contentType, headers }, or a promise of it, or throws Drop where nothing is to be sent; what it computes
// without awaiting anything holds up all others. What an instance holds it gives back in a function that it hands to target.onClose: it is called when the instance is removed and its last
// attempt has ended, at once when it was built for a check alone, or when the process ends.
import dns from "node:dns";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import util from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const MAGIC_COOKIE = ["GRAPNEL_PLUGIN", "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31"];
const PROTOCOL_MINOR = 4;
const MAX_MESSAGE = 32 << 20;
const MAX_TRANSFORMED = 256 << 10;
const GRACE = 4000; // milliseconds for work at hand once the host is gone

// Problem is a complaint about a config, for people. pointer is an RFC 6901 pointer such as /config/url.
export class Problem extends Error {
  constructor(summary, { pointer = "", code = "config.invalid", warning = false } = {}) {
    super(summary);
    Object.assign(this, { pointer, code, warning });
  }
}

// Failure is an attempt that got no answer. source is "endpoint", "plugin" or "policy"; wire is "not_sent",
// "maybe_sent" or "sent" and says what may have reached the receiver.
export class Failure extends Error {
  constructor(source, code, message, wire = "maybe_sent") {
    super(message);
    Object.assign(this, { source, code, wire });
  }
}

// Drop is thrown by a transformer where nothing is to be sent; the reason is for people, and shown to them.
export class Drop extends Error {}

// Event is what a transformer makes something of, as it was published: messageId, id, source, type, subject, time
// (seconds), contentType, dataSchema, attributes (by name), data (Buffer), timeout (milliseconds that are left), signal
// (AbortSignal).
export class Event {
  constructor(fields) { Object.assign(this, fields); }
  // json is the payload, which may be none: then it throws, which fails the transformation.
  json() {
    try { return JSON.parse(this.data.toString()); } catch { throw new Error("the payload is not JSON"); }
  }
}

// Secret is the live versions of a secret as Buffers, newest first. It prints as [redacted].
export class Secret extends Array {
  toString() { return "[redacted]"; }
  toJSON() { return "[redacted]"; }
  [util.inspect.custom]() { return "[redacted]"; }
}

// Request is what is to be signed and sent: messageId, eventType, created (seconds), nonce, method, url, headers as
// [name, value] with names in lower case, body (Buffer), timeout (milliseconds), signal (AbortSignal).
export class Request {
  constructor(fields) { Object.assign(this, fields); }
  get(name) { return this.headers.find(([n]) => n === name.toLowerCase())?.[1] ?? ""; }
  set(name, value) {
    this.headers = this.headers.filter(([n]) => n !== name.toLowerCase());
    this.headers.push([name.toLowerCase(), String(value)]);
  }
}

// Egress: public addresses are open on ports 80, 443, 8080 and 8443; the server's allow list on every
// port, its deny list never.
export class Egress {
  constructor(allow = [], deny = []) {
    this.open = blockList(allow);
    this.denied = deny.map((rule) => {
      const [, range, port] = /^([^/]*\/\d+)(?::(\d+))?$/.exec(rule);
      return { list: blockList([range]), port: Number(port ?? 0) };
    });
    this.closed = blockList([
      "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
      "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
      "224.0.0.0/4", "240.0.0.0/4", "::/16", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16",
      "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "64:ff9b::/96",
    ]);
  }

  allows(address, port) {
    const plain = address.split("%")[0].replace(/^::ffff:(?=\d+\.)/i, "");
    const family = net.isIPv6(plain) ? "ipv6" : "ipv4";
    if (this.denied.some((d) => (d.port === 0 || d.port === port) && d.list.check(plain, family))) return false;
    if (this.open.check(plain, family)) return true;
    return [80, 443, 8080, 8443].includes(port) && !this.closed.check(plain, family);
  }

  // connect resolves to a connected socket; the check is made on the address that is connected to.
  connect(host, port, signal) {
    const denied = () => new Failure("policy", "egress", "blocked by egress policy", "not_sent");
    return new Promise((resolve, reject) => {
      if (net.isIP(host) && !this.allows(host, port)) return reject(denied());
      const lookup = (name, options, done) => dns.lookup(name, { ...options, all: true }, (err, found) => {
        if (err) return done(new Failure("endpoint", "dns", "the host name could not be looked up", "not_sent"));
        const open = found.filter((a) => this.allows(a.address, port));
        if (open.length === 0) return done(denied());
        options.all ? done(null, open) : done(null, open[0].address, open[0].family);
      });
      const socket = net.connect({ host, port, lookup, signal });
      socket.once("connect", () => resolve(socket));
      socket.once("error", (e) => reject(e instanceof Failure ? e
        : new Failure("endpoint", "connect", e.code === "ECONNREFUSED" ? "connection refused" : "no connection", "not_sent")));
    });
  }
}

function blockList(ranges) {
  const list = new net.BlockList();
  for (const range of ranges) {
    const [address, bits] = range.split("/");
    list.addSubnet(address, Number(bits), net.isIPv6(address) ? "ipv6" : "ipv4");
  }
  return list;
}

// Instance counts who is at work with it, so that it is closed once: when it is removed and nobody is.
class Instance {
  #users = 0;
  #retired = false;

  constructor(id, target, known, closers) { Object.assign(this, { id, target, values: known, closers }); }

  use(request) {
    this.#users++;
    const left = () => { if (--this.#users === 0 && this.#retired) close(this.closers); };
    let answer;
    try { answer = this.run(request); } catch (e) { left(); throw e; }
    if (typeof answer?.then === "function") answer.then(left, left);
    else left();
    return answer;
  }

  retire() {
    this.#retired = true;
    if (this.#users === 0) close(this.closers);
  }
}

// close calls what target.onClose was given, the last first, and once.
function close(closers) {
  while (closers.length > 0) {
    try { Promise.resolve(closers.pop()()).catch(console.error); } catch (e) { console.error(e); }
  }
}

// Plugin is a plugin process. Register kinds with signer, transport and transformer, then call main.
export class Plugin {
  #kinds = new Map();
  #instances = new Map();
  #newest = new Map();
  #egress = new Egress();
  #agent = "grapnel";
  #inFlight = 0;
  #hostSeen = false;
  #server;

  constructor(name, version) { Object.assign(this, { name, version }); }

  // signer registers a signer. options: emits (headers, required), config (settings by name: {type, doc,
  // default, required, enum, minimum, maximum}), secrets ([{name, doc, required, format, algorithms,
  // generate(algorithm), read(buffer)}]), doc, example, deterministic.
  signer(id, options, build) { this.#register(id, "signer", options, build); }

  // transport registers a transport. options as for signer, with schemes, and adds for headers.
  transport(id, options, build) { this.#register(id, "transport", options, build); }

  // transformer registers a transformer. options as for signer, without emits.
  transformer(id, options, build) { this.#register(id, "transformer", options, build); }

  #register(id, role, options, build) {
    if (!/^[a-z][a-z0-9-]{0,62}$/.test(id)) throw new Error(`kind ${id}: the id must match ^[a-z][a-z0-9-]{0,62}$`);
    this.#kinds.set(id, { id, role, build, config: {}, secrets: [], emits: [], schemes: [], adds: [], doc: "", deterministic: true, example: {}, ...options });
  }

  // main serves until the host is gone, then exits the process.
  main() {
    if (process.env[MAGIC_COOKIE[0]] !== MAGIC_COOKIE[1]) {
      process.stderr.write(`${this.name} ${this.version}: this program is a Grapnel plugin and is started by the Grapnel server\n`);
      process.exit(1);
    }
    // The host says when to stop; a signal to the whole group must not cut its drain short.
    for (const s of ["SIGINT", "SIGTERM"]) process.on(s, () => this.#hostSeen || process.exit(0));
    const directory = process.env.PLUGIN_UNIX_SOCKET_DIR || fs.mkdtempSync(path.join(os.tmpdir(), "p"));
    const socket = path.join(directory, "plugin" + process.pid);
    const api = loadProtocol();
    const server = new grpc.Server({ "grpc.max_receive_message_length": MAX_MESSAGE, "grpc.max_send_message_length": MAX_MESSAGE });
    const unary = (fn) => (call, done) => {
      try { done(null, fn(call.request)); } catch (e) { done({ code: grpc.status.INTERNAL, message: String(e?.message ?? e) }); }
    };
    server.addService(api.PluginService.service, {
      Describe: unary(() => this.#describe()), Validate: unary((r) => this.#validate(r)),
      Configure: unary((r) => this.#configure(r)), Remove: unary((r) => this.#remove(r)),
      PrepareSecret: unary((r) => this.#prepare(r)), Control: (call) => this.#control(call),
    });
    server.addService(api.SignerService.service, { Sign: (call) => this.#sign(call) });
    server.addService(api.TransportService.service, {
      AttemptOne: (call, done) => this.#attemptOne(call.request).then((r) => done(null, r), (e) => done({ code: grpc.status.INTERNAL, message: String(e) })),
    });
    server.addService(api.TransformerService.service, { Transform: (call) => this.#transform(call) });
    this.#server = server;
    server.bindAsync("unix:" + socket, grpc.ServerCredentials.createInsecure(), (err) => {
      if (err) throw err;
      process.stdout.write(`1|1|unix|${socket}|grpc|\n`);
      process.stdout.write = process.stderr.write.bind(process.stderr); // standard output belonged to the handshake
    });
    const parent = process.ppid;
    setInterval(() => process.ppid === parent || this.#stop(), 1000).unref();
  }

  #stop() {
    const end = () => {
      for (const instance of this.#instances.values()) instance.retire();
      setImmediate(() => process.exit(0));
    };
    this.#server.tryShutdown(end);
    setTimeout(end, GRACE);
  }

  #describe() {
    const kinds = [...this.#kinds.values()];
    const capabilities = [];
    if (kinds.some((k) => k.role === "signer")) capabilities.push("sign.stream");
    if (kinds.some((k) => k.role === "transport")) capabilities.push("attempt.unary");
    if (kinds.some((k) => k.role === "transformer")) capabilities.push("transform.stream");
    if (kinds.some((k) => k.secrets.some((s) => s.format))) capabilities.push("secret.prepare");
    return { name: this.name, version: this.version, protocol_minor: PROTOCOL_MINOR, capabilities, kinds: kinds.map(describeKind) };
  }

  #validate({ instance }) {
    const { instance: built, problems } = this.#build(instance, true);
    built?.retire();
    return { diagnostics: diagnostics(problems, values(instance)) };
  }

  #configure({ settings, instances }) {
    if (settings) [this.#egress, this.#agent] = [new Egress(settings.egress_allow, settings.egress_deny), settings.user_agent];
    const statuses = instances.map((given) => {
      const newest = this.#newest.get(given.id) ?? { generation: 0n, refs: new Set() };
      if (BigInt(given.generation) < newest.generation) {
        const stale = new Problem(`generation ${given.generation} is older than ${newest.generation}`, { code: "config.stale" });
        return { ref: given.ref, diagnostics: diagnostics([stale], []) };
      }
      const { instance, problems } = this.#build(given, false);
      if (instance) {
        this.#instances.get(given.ref)?.retire();
        this.#instances.set(given.ref, instance);
        newest.generation = BigInt(given.generation);
        newest.refs.add(given.ref);
        this.#newest.set(given.id, newest);
      }
      return { ref: given.ref, diagnostics: diagnostics(problems, values(given)) };
    });
    return { statuses };
  }

  #remove({ refs }) {
    for (const ref of refs) {
      const gone = this.#instances.get(ref);
      if (!gone) continue;
      this.#instances.delete(ref);
      gone.retire();
      const newest = this.#newest.get(gone.id);
      newest.refs.delete(ref);
      if (newest.refs.size === 0) this.#newest.delete(gone.id);
    }
    return {};
  }

  #prepare({ kind, slot: name, value, algorithm }) {
    try {
      const slot = this.#kinds.get(kind)?.secrets.find((s) => s.name === name);
      if (!slot) throw new Problem(`there is no secret slot "${name}" of "${kind}"`, { code: "secret.unknown_slot" });
      if (value.length === 0) {
        if (!slot.generate) throw new Problem("a value must be given: none can be made", { pointer: "/value", code: "secret.required" });
        const wanted = algorithm || slot.algorithms[0];
        if (!slot.algorithms.includes(wanted)) {
          throw new Problem(`given "${wanted}", want one of ${slot.algorithms.join(", ")}`, { pointer: "/algorithm", code: "secret.algorithm" });
        }
        value = Buffer.from(slot.generate(wanted));
      }
      try { return { value: slot.read?.(value) ?? value }; } catch (e) {
        throw new Problem(e.message, { pointer: "/value", code: "secret.malformed" });
      }
    } catch (e) {
      if (!(e instanceof Problem)) throw e;
      return { diagnostics: diagnostics([e], [value]) };
    }
  }

  #control(call) {
    this.#hostSeen = true;
    call.on("data", (frame) => {
      if (frame.heartbeat) call.write({ heartbeat: { number: frame.heartbeat.number, in_flight: this.#inFlight } });
    });
    const gone = () => { call.end(); this.#stop(); };
    call.on("end", gone);
    call.on("error", gone);
    call.on("cancelled", gone);
  }

  #build(given, validate) {
    const kind = this.#kinds.get(given.kind);
    if (!kind) return { problems: [new Problem(`${this.name} offers no kind "${given.kind}"`, { code: "config.unknown_kind" })] };
    const { config, problems } = readConfig(kind, given.config_json);
    const secrets = {};
    let shapeOnly = false;
    for (const name of Object.keys(given.secrets)) {
      if (!kind.secrets.some((s) => s.name === name)) {
        problems.push(new Problem(`there is no secret slot "${name}"; there are ${kind.secrets.map((s) => s.name).join(", ") || "none"}`,
          { pointer: "/secrets/" + escape(name), code: "secret.unknown_slot" }));
      }
    }
    for (const slot of kind.secrets) {
      const now = Date.now() / 1000;
      const versions = given.secrets[slot.name]?.versions ?? [];
      const live = Secret.from(versions.filter((v) => !v.expire_time || Number(v.expire_time.seconds) > now).map((v) => v.value));
      if (slot.required && live.length === 0) {
        if (validate) shapeOnly = true;
        else problems.push(new Problem(`secret slot "${slot.name}" is empty and required`, { pointer: "/secrets/" + escape(slot.name), code: "secret.missing" }));
      }
      for (const value of live) {
        try { slot.read?.(value); } catch (e) {
          problems.push(new Problem(e.message, { pointer: "/secrets/" + escape(slot.name), code: "secret.malformed" }));
        }
      }
      secrets[slot.name] = live;
    }
    if (shapeOnly || problems.some((p) => !p.warning)) return { problems };
    const closers = [];
    const target = {
      method: given.target?.method ?? "", url: given.target?.uri ?? "", headers: pairs(given.target?.headers), egress: this.#egress, userAgent: this.#agent,
      onClose: (closer) => closers.push(closer),
    };
    const instance = new Instance(given.id, target, values(given), closers);
    try {
      instance.run = kind.build({ config, secrets, target });
      return { instance, problems };
    } catch (e) {
      instance.retire();
      if (e instanceof Problem) return { problems: [...problems, e] };
      console.error(e);
      return { problems: [...problems, new Problem("the plugin failed on this config", { code: "panic" })] };
    }
  }

  #sign(call) {
    call.on("data", ({ contents, items }) => {
      const results = items.map((item) => {
        const instance = this.#instances.get(item.instance_ref);
        if (!instance) return { seq: item.seq, failure: failure(stale(item.instance_ref), []) };
        const content = contents[item.content];
        if (!content) return { seq: item.seq, failure: failure(new Failure("plugin", "protocol", "no such content", "not_sent"), []) };
        const created = Number(item.created?.seconds ?? 0) + (item.created?.nanos ?? 0) / 1e9;
        const request = newRequest(instance, content, { created, nonce: item.nonce, headers: item.headers });
        const given = request.url = item.uri || request.url;
        const before = request.headers.length;
        try { instance.use(request); } catch (e) {
          return { seq: item.seq, failure: failure(new Failure("plugin", "sign", e.message, "not_sent"), instance.values) };
        }
        return { seq: item.seq, headers: fields(request.headers.slice(before)), uri: request.url === given ? "" : request.url };
      });
      call.write({ results });
    });
    call.on("end", () => call.end());
  }

  // #transform begins each item in a turn of its own, so that heartbeats come between them, and answers as they end.
  #transform(call) {
    let open = 0, over = false;
    const end = () => { if (over && open === 0) call.end(); };
    call.on("data", ({ events, items }) => {
      const until = items.map((item) => Date.now() + (item.timeout_ms || 15000));
      open += items.length;
      items.forEach((item, i) => setImmediate(async () => {
        const result = await this.#transformItem(item, events[item.event], until[i]);
        if (!call.cancelled) call.write({ results: [result] });
        open--;
        end();
      }));
    });
    call.on("end", () => { over = true; end(); });
    call.on("error", () => {});
  }

  async #transformItem(item, e, until) {
    const instance = this.#instances.get(item.instance_ref);
    if (!instance) return { seq: item.seq, failure: failure(stale(item.instance_ref), []) };
    if (!e) return { seq: item.seq, failure: failure(new Failure("plugin", "protocol", "no such event", "not_sent"), []) };
    try {
      const timeout = until - Date.now();
      const late = () => new Failure("plugin", "timeout", "the transformation took too long", "not_sent");
      if (timeout <= 0) throw late();
      const event = new Event({
        messageId: e.message_id, id: e.id, source: e.source, type: e.type, subject: e.subject, contentType: e.content_type, dataSchema: e.data_schema,
        time: Number(e.time?.seconds ?? 0) + (e.time?.nanos ?? 0) / 1e9, attributes: e.attributes, data: e.data, timeout, signal: AbortSignal.timeout(timeout),
      });
      const made = await inTime(instance.use(event), timeout, late);
      if (made?.body === undefined) throw new Error("the transformer has returned no body");
      const body = Buffer.from(made.body);
      if (body.length > MAX_TRANSFORMED) throw new Error(`the body has ${body.length} bytes; at most ${MAX_TRANSFORMED} can be sent`);
      return { seq: item.seq, transformed: { body, content_type: made.contentType ?? "application/json", headers: fields(made.headers ?? []) } };
    } catch (problem) {
      if (problem instanceof Drop) return { seq: item.seq, dropped: { reason: redact(problem.message || "no reason was given", instance.values) } };
      const code = problem instanceof Failure ? problem.code : "transform";
      return { seq: item.seq, failure: failure(new Failure("plugin", code, problem?.message || String(problem), "not_sent"), instance.values) };
    }
  }

  async #attemptOne({ attempt: a, content, max_response_body: most }) {
    const began = process.hrtime.bigint();
    const result = { seq: a.seq };
    const known = [];
    this.#inFlight++;
    try {
      await this.#run(a, content, most, result, known);
    } catch (e) {
      if (!(e instanceof Failure)) console.error(e);
      result.failure = failure(e instanceof Failure ? e : new Failure("plugin", "panic", "the plugin failed: " + e.name), known);
    } finally {
      this.#inFlight--;
    }
    result.total_us = String((process.hrtime.bigint() - began) / 1000n);
    return { result };
  }

  async #run(a, content, most, result, known) {
    const instance = this.#instances.get(a.instance_ref);
    if (!instance) throw stale(a.instance_ref);
    known.push(...instance.values);
    const timeout = a.timeout_ms || 15000;
    const request = newRequest(instance, content, {
      created: Number(BigInt(a.created_unix_nano) / 1000000n) / 1000, nonce: a.nonce, headers: a.headers, timeout, signal: AbortSignal.timeout(timeout),
      attemptNumber: a.attempt_number, traceparent: a.traceparent, maxResponseBody: most, ownershipCheck: a.ownership_check,
    });
    if (a.uri) request.url = a.uri;
    const before = request.headers.length - a.headers.length;
    for (const ref of a.sign_here) {
      const signer = this.#instances.get(ref);
      if (!signer) throw stale(ref);
      known.push(...signer.values);
      try { signer.use(request); } catch (e) { throw new Failure("plugin", "sign", e.message, "not_sent"); }
    }
    const answer = await inTime(instance.use(request), timeout + 250);
    const ok = answer.status >= 200 && answer.status <= 299;
    if (!ok) result.sent_headers = fields(request.headers.slice(before).filter(([n]) => !/authorization|cookie|token|secret|password|api-?key/.test(n)));
    const body = answer.body ?? Buffer.alloc(0);
    result.peer = answer.peer ?? "";
    result.response = {
      status: answer.status, body: body.subarray(0, most), body_truncated: body.length > most,
      headers: fields((answer.headers ?? []).filter(([n]) => !ok || n.toLowerCase() === "retry-after")),
    };
  }
}

// loadProtocol reads the services from plugin.proto.
function loadProtocol() {
  const file = fileURLToPath(new URL("plugin.proto", import.meta.url));
  const definition = loader.loadSync(file, { keepCase: true, longs: String, enums: Number, defaults: true, oneofs: true });
  return grpc.loadPackageDefinition(definition).grapnel.plugin.v1;
}

function describeKind(k) {
  const properties = Object.fromEntries(Object.entries(k.config).map(([name, f]) => {
    const { doc: description, required, ...rest } = f;
    return [name, { ...rest, ...(description && { description }) }];
  }));
  const schema = {
    $schema: "https://json-schema.org/draft/2020-12/schema", type: "object", additionalProperties: false, properties,
    required: Object.keys(k.config).filter((name) => k.config[name].required),
  };
  const traits = {
    signer: { emits_headers: k.emits.map((h) => h.toLowerCase()), deterministic: k.deterministic },
    transport: { uri_schemes: k.schemes, may_add_headers: k.adds.map((h) => h.toLowerCase()) },
    transformer: {},
  };
  return {
    id: k.id, description: k.doc, config_schema: JSON.stringify(schema), config_example: JSON.stringify(k.example), [k.role]: traits[k.role],
    secret_slots: k.secrets.map((s) => ({ name: s.name, description: s.doc, required: s.required, format: s.format, algorithms: s.algorithms })),
  };
}

// readConfig checks the shape and fills in defaults.
function readConfig(kind, raw) {
  const problems = [];
  const wrong = (name, code, text) => problems.push(new Problem(text, { pointer: "/config/" + escape(name), code }));
  let given;
  try { given = raw.length ? JSON.parse(raw.toString()) : {}; } catch {
    return { problems: [new Problem("the config is not JSON", { pointer: "/config", code: "config.syntax" })] };
  }
  if (given === null || typeof given !== "object" || Array.isArray(given)) {
    return { problems: [new Problem("want a JSON object", { pointer: "/config", code: "config.type" })] };
  }
  for (const name of Object.keys(given)) {
    if (!Object.hasOwn(kind.config, name)) wrong(name, "config.unknown_field", `there is no field "${name}"; there are ${Object.keys(kind.config).join(", ") || "none"}`);
  }
  const config = {};
  for (const [name, f] of Object.entries(kind.config)) {
    const value = given[name];
    if (value === undefined) {
      if (f.required) wrong(name, "config.missing", `field "${name}" is missing and required`);
      config[name] = f.default;
      continue;
    }
    const shown = JSON.stringify(value);
    const fits = f.type === "integer" ? Number.isInteger(value) : typeof value === f.type;
    if (!fits) wrong(name, "config.type", `given ${shown}, want a ${f.type}`);
    else if (f.enum && !f.enum.includes(value)) wrong(name, "config.enum", `given ${shown}, want one of ${f.enum.join(", ")}`);
    else if (f.minimum !== undefined && value < f.minimum) wrong(name, "config.range", `given ${shown}, want at least ${f.minimum}`);
    else if (f.maximum !== undefined && value > f.maximum) wrong(name, "config.range", `given ${shown}, want at most ${f.maximum}`);
    config[name] = value;
  }
  return { config, problems };
}

function newRequest(instance, content, { headers, ...rest }) {
  const request = new Request({
    messageId: content.message_id, eventType: content.event_type, body: content.body, method: instance.target.method, url: instance.target.url,
    headers: pairs(content.headers), ...rest,
  });
  for (const [name, value] of instance.target.headers) request.set(name, value);
  request.headers.push(...pairs(headers));
  return request;
}

// inTime lets what overstays its time cost itself, not the process.
async function inTime(answer, milliseconds, problem = () => new Failure("endpoint", "timeout", "no answer in time")) {
  let timer;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(problem()), milliseconds); });
  try { return await Promise.race([answer, late]); } finally { clearTimeout(timer); }
}

function failure(f, known) {
  return {
    source: { endpoint: 1, plugin: 2, policy: 3, config: 4 }[f.source], wire_state: { not_sent: 1, maybe_sent: 2, sent: 3 }[f.wire],
    code: f.code, message: redact(f.message, known),
  };
}

function diagnostics(problems, known) {
  return problems.map((p) => ({ severity: p.warning ? 2 : 1, code: p.code, pointer: p.pointer, summary: redact(p.message, known) }));
}

function redact(text, known) {
  for (const v of known.map(String)) if (v.length >= 6) text = text.replaceAll(v, "[redacted]");
  return text;
}

const stale = (ref) => new Failure("config", "config", `no instance with ref ${ref}`, "not_sent");
const values = (instance) => Object.values(instance.secrets).flatMap((s) => s.versions.map((v) => v.value));
const pairs = (headers) => (headers ?? []).map((h) => [h.name.toLowerCase(), h.value]);
const fields = (headers) => headers.map(([name, value]) => ({ name: name.toLowerCase(), value: String(value) }));
const escape = (segment) => segment.replaceAll("~", "~0").replaceAll("/", "~1");
