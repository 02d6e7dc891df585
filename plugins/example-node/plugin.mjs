import crypto from "node:crypto";
import http from "node:http";
import tls from "node:tls";

import { Failure, Plugin, Problem } from "./grapnel-plugin.mjs";

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
  doc: "HTTP requests, one connection each, for URIs that begin with node+http or node+https",
  example: { method: "PUT" },
}, ({ config, target }) => {
  const u = new URL(target.url);
  if (!["node+http:", "node+https:"].includes(u.protocol) || !u.hostname) {
    throw new Problem("want node+http://host/path or node+https://host/path", { pointer: "/target/uri", code: "uri.invalid" });
  }
  const secure = u.protocol === "node+https:";
  const host = u.hostname.replace(/^\[|\]$/g, "");
  const port = Number(u.port || (secure ? 443 : 80));
  return async (request) => {
    let socket = await target.egress.connect(host, port, request.signal);
    if (secure) socket = await handshake(socket, host);
    const headers = new Map([["host", u.host], ["user-agent", target.userAgent], ...request.headers]);
    if (request.traceparent) headers.set("traceparent", request.traceparent);
    headers.set("content-length", String(request.body.length));
    const sent = new URL(request.url);
    return exchange(socket, { method: config.method, path: (sent.pathname || "/") + sent.search, headers: Object.fromEntries(headers) }, request);
  };
});

function handshake(socket, host) {
  return new Promise((resolve, reject) => {
    const secured = tls.connect({ socket, servername: host }, () => resolve(secured));
    secured.once("error", () => reject(new Failure("endpoint", "tls", "the TLS handshake failed", "not_sent")));
  });
}

// exchange sends one request over a connection of its own and reads the answer, as much as is kept.
function exchange(socket, options, request) {
  return new Promise((resolve, reject) => {
    const peer = `${socket.remoteAddress}:${socket.remotePort}`;
    const sent = http.request({ ...options, createConnection: () => socket, signal: request.signal }, async (answer) => {
      const chunks = [];
      let size = 0;
      try {
        for await (const chunk of answer) {
          chunks.push(chunk);
          if ((size += chunk.length) > request.maxResponseBody) break;
        }
      } catch { /* the status stands without the rest of its body */ }
      socket.destroy();
      const headers = [];
      for (let i = 0; i < answer.rawHeaders.length; i += 2) headers.push([answer.rawHeaders[i], answer.rawHeaders[i + 1]]);
      resolve({ status: answer.statusCode, headers, body: Buffer.concat(chunks), peer });
    });
    sent.once("error", (e) => {
      socket.destroy();
      if (e.name === "AbortError" || e.name === "TimeoutError") reject(new Failure("endpoint", "timeout", "no answer in time"));
      else if (String(e.code).startsWith("HPE_")) reject(new Failure("endpoint", "protocol", "the receiver did not answer in HTTP"));
      else reject(new Failure("endpoint", "reset", "the receiver closed the connection without an answer"));
    });
    sent.end(request.body);
  });
}

plugin.main();
