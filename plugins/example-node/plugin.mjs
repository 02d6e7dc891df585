import crypto from "node:crypto";
import http from "node:http";
import tls from "node:tls";

import { Drop, Failure, Plugin, Problem } from "./grapnel-plugin.mjs";

const plugin = new Plugin("example/node", "0.1.0");

const key = {
  name: "key", doc: "Shared key.", required: true, format: "16 characters or more, used as they are",
  algorithms: ["hmac-sha256"],
  generate: () => crypto.randomBytes(32).toString("hex"),
  read: (value) => {
    if (value.length < 16 || value.some((c) => c <= 32)) {
      throw new Problem("the key has fewer than 16 characters, or spaces; want 16 or more without spaces");
    }
  },
};

plugin.signer("node-hmac", {
  emits: ["x-node-signature"],
  config: { prefix: { type: "string", doc: "What stands before the signature.", default: "v1=" } },
  secrets: [key],
  doc: "HMAC-SHA256 over the message ID, the time and the body",
  example: { prefix: "v1=" },
}, ({ config, secrets }) => (request) => {
  const t = Math.floor(request.created);
  const macs = [...secrets.key].map((k) =>
    crypto.createHmac("sha256", k).update(`${request.messageId}.${t}.`).update(request.body).digest("hex"));
  request.set("x-node-signature", `t=${t},` + macs.map((m) => config.prefix + m).join(","));
});

plugin.transport("node-http", {
  schemes: ["node+http", "node+https"],
  config: { method: { type: "string", doc: "HTTP method.", default: "POST", enum: ["POST", "PUT"] } },
  adds: ["user-agent", "traceparent"],
  doc: "HTTP requests for URIs that begin with node+http or node+https",
  example: { method: "PUT" },
}, ({ config, target }) => {
  const u = new URL(target.url);
  if (!["node+http:", "node+https:"].includes(u.protocol) || !u.hostname) {
    throw new Problem("want node+http://host/path or node+https://host/path", { pointer: "/target/uri", code: "uri.invalid" });
  }
  const secure = u.protocol === "node+https:";
  const host = u.hostname.replace(/^\[|\]$/g, "");
  const port = Number(u.port || (secure ? 443 : 80));
  const agent = new Connections(target.egress, { host, port, secure });
  target.onClose(() => agent.destroy());
  return (request) => {
    const headers = new Map([["host", u.host], ["user-agent", target.userAgent], ...request.headers]);
    if (request.traceparent) headers.set("traceparent", request.traceparent);
    headers.set("content-length", String(request.body.length));
    const sent = new URL(request.url);
    return exchange({ agent, method: config.method, path: (sent.pathname || "/") + sent.search, headers: Object.fromEntries(headers) }, request);
  };
});

// Connections are kept and used again. Each is made to an address that the egress policy has passed.
class Connections extends http.Agent {
  constructor(egress, to) {
    super({ keepAlive: true });
    Object.assign(this, { egress, to });
  }

  createConnection(_, done) {
    const { host, port, secure } = this.to;
    this.egress.connect(host, port, AbortSignal.timeout(10_000))
      .then((socket) => (secure ? handshake(socket, host) : socket))
      .then((socket) => done(null, socket), done);
  }
}

function handshake(socket, host) {
  return new Promise((resolve, reject) => {
    const secured = tls.connect({ socket, servername: host }, () => resolve(secured));
    secured.once("error", () => reject(new Failure("endpoint", "tls", "the TLS handshake failed", "not_sent")));
  });
}

// exchange sends one request and reads the answer, as much as is kept.
function exchange(options, request) {
  return new Promise((resolve, reject) => {
    const sent = http.request({ ...options, signal: request.signal }, async (answer) => {
      const peer = `${answer.socket.remoteAddress}:${answer.socket.remotePort}`;
      const chunks = [];
      let size = 0;
      try {
        for await (const chunk of answer) {
          chunks.push(chunk);
          if ((size += chunk.length) > request.maxResponseBody) break; // which gives the connection up
        }
      } catch { /* the status stands without the rest of its body */ }
      const headers = [];
      for (let i = 0; i < answer.rawHeaders.length; i += 2) headers.push([answer.rawHeaders[i], answer.rawHeaders[i + 1]]);
      resolve({ status: answer.statusCode, headers, body: Buffer.concat(chunks), peer });
    });
    sent.once("error", (e) => {
      if (e instanceof Failure) reject(e);
      else if (e.name === "AbortError" || e.name === "TimeoutError") reject(new Failure("endpoint", "timeout", "no answer in time"));
      else if (String(e.code).startsWith("HPE_")) reject(new Failure("endpoint", "protocol", "the receiver did not answer in HTTP"));
      else reject(new Failure("endpoint", "reset", "the receiver closed the connection without an answer"));
    });
    sent.end(request.body);
  });
}

// A pseudonym, the same for the same value, stands in the place of what names a person.
plugin.transformer("node-pseudonym", {
  config: { fields: { type: "string", doc: "Fields whose values are replaced, with commas between.", default: "email" } },
  secrets: [key],
  doc: "Puts a pseudonym, the same for the same value, in the place of what names a person",
  example: { fields: "email,phone" },
}, ({ config, secrets }) => {
  const hidden = new Set(config.fields.split(","));
  const pseudonym = (value) => crypto.createHmac("sha256", secrets.key[0]).update(JSON.stringify(value)).digest("hex").slice(0, 32);
  return (event) => {
    const data = event.json();
    if (data === null) throw new Drop("the payload is null");
    return { body: JSON.stringify(data, (name, value) => (hidden.has(name) && value !== null ? pseudonym(value) : value)) };
  };
});

plugin.main();
