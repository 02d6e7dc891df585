// Reads one JSON request a line on standard input, has the scheme's official library verify it, and writes
// one JSON verdict a line: {"ok":true} or {"ok":false,"error":"…"}.
//
// A request: {scheme, url, method, headers, body (base64), key, keyId, config}. Header names are lower case. key
// is what a receiver would hold: the shared secret, or the public key as PEM; keyId what the scheme calls it.
import crypto from "node:crypto";
import readline from "node:readline";
import { createRequire } from "node:module";

import { verify as octokit } from "@octokit/webhooks-methods";
import "@shopify/shopify-api/adapters/node";
import { shopifyApi, ApiVersion } from "@shopify/shopify-api";
import bolt from "@slack/bolt";
import { SignatureV4 } from "@smithy/signature-v4";
import aws4 from "aws4";
import { HTTP } from "cloudevents";
import { httpbis, createVerifier } from "http-message-signatures";
import { verifySignature } from "http-message-sig";
import * as jose from "jose";
import { WebhooksHelper } from "square";
import { Webhook as StandardWebhook } from "standardwebhooks";
import Stripe from "stripe";
import { Webhook as SvixWebhook } from "svix";
import twilio from "twilio";

const require = createRequire(import.meta.url);
const hook0 = require("hook0-client");

class Sha256 {
  constructor(key) { this.hash = key === undefined ? crypto.createHash("sha256") : crypto.createHmac("sha256", Buffer.from(key)); }
  update(data) { this.hash.update(data); }
  async digest() { return new Uint8Array(this.hash.digest()); }
}

function expect(condition, text) {
  if (!condition) throw new Error(text);
}

// pathAndQuery is the URL as it stood in the request line.
const pathAndQuery = (url) => { const u = new URL(url); return u.pathname + u.search; };

const schemes = {
  "standard-webhooks": (r) => r.key.startsWith("whpk_") ? verifyV1a(r) : new StandardWebhook(r.key).verify(r.text, r.headers),
  "svix": (r) => new SvixWebhook(r.key).verify(r.text, {
    "svix-id": r.headers["svix-id"], "svix-timestamp": r.headers["svix-timestamp"], "svix-signature": r.headers["svix-signature"],
  }),
  "stripe": (r) => new Stripe("sk_test_none").webhooks.constructEvent(r.text, r.headers["stripe-signature"], r.key),
  "github": async (r) => expect(await octokit(r.key, r.text, r.headers["x-hub-signature-256"]), "octokit says no"),
  "slack": (r) => bolt.verifySlackRequest({
    signingSecret: r.key, body: r.text,
    headers: { "x-slack-signature": r.headers["x-slack-signature"], "x-slack-request-timestamp": Number(r.headers["x-slack-request-timestamp"]) },
  }),
  "shopify": async (r) => {
    const api = shopifyApi({
      apiKey: "none", apiSecretKey: r.key, apiVersion: ApiVersion.October25 ?? Object.values(ApiVersion).at(-1),
      isEmbeddedApp: true, hostName: "example.com", logger: { log: () => {} },
    });
    const got = await api.webhooks.validate({
      rawBody: r.text,
      rawRequest: { method: r.method, url: pathAndQuery(r.url), headers: r.headers },
      rawResponse: {},
    });
    expect(got.valid, JSON.stringify(got));
  },
  "twilio": (r) => {
    const signature = r.headers["x-twilio-signature"];
    if ((r.headers["content-type"] ?? "").startsWith("application/x-www-form-urlencoded")) {
      expect(twilio.validateRequest(r.key, signature, r.url, Object.fromEntries(new URLSearchParams(r.text))), "twilio says no");
    } else {
      expect(twilio.validateRequestWithBody(r.key, signature, r.url, r.text), "twilio says no");
    }
  },
  "square": async (r) => expect(await WebhooksHelper.verifySignature({
    requestBody: r.text, signatureHeader: r.headers["x-square-hmacsha256-signature"], signatureKey: r.key,
    notificationUrl: r.config.notification_url,
  }), "square says no"),
  "hook0": (r) => {
    const ok = hook0.verifyWebhookSignature(r.headers["x-hook0-signature"], r.body, new Headers(r.headers), r.key, 300);
    expect(ok === true, String(ok));
  },
  // Convoy, Outpost and WebhookX have no verifier on npm: written here from their documentation.
  "convoy": (r) => {
    const parts = r.headers["x-convoy-signature"].split(",").map((p) => p.split("="));
    const t = parts.find(([k]) => k === "t")[1];
    const want = crypto.createHmac("sha256", r.key).update(`${t},`).update(r.body).digest("hex");
    expect(parts.some(([k, v]) => k === "v1" && v === want), "no v1 fits");
  },
  "outpost": (r) => {
    const want = crypto.createHmac("sha256", r.key).update(r.body).digest("hex");
    const header = r.headers["x-outpost-signature"];
    expect(header.startsWith("v0=") && header.slice(3).split(",").includes(want), "no signature fits");
  },
  "webhookx": (r) => {
    const t = r.headers["webhookx-timestamp"];
    const want = crypto.createHmac("sha256", r.key).update(`${t}.`).update(r.body).digest("hex");
    expect(r.headers["webhookx-signature"].split(",").includes("v1=" + want), "no signature fits");
  },
  // The generic kind, with the template that the test gives it: sha512, base64url of "{timestamp}:{body}".
  "hmac": (r) => {
    const want = crypto.createHmac("sha512", r.key).update(r.headers["x-house-time"] + ":").update(r.body).digest("base64url");
    expect(r.headers["x-house-signature"] === "v9 " + want, "the template's signature does not fit");
  },
  "http-signature": async (r) => {
    const digest = crypto.createHash("sha256").update(r.body).digest("base64");
    if (r.headers["content-digest"]) expect(r.headers["content-digest"] === `sha-256=:${digest}:`, "content-digest does not fit");
    const key = r.config.algorithm === "hmac-sha256" ? sharedKey(r.key) : crypto.createPublicKey(r.key);
    const verifier = createVerifier(key, r.config.algorithm);
    const ok = await httpbis.verifyMessage({
      // A receiver knows its own key and passes over signatures by others.
      keyLookup: async ({ keyid }) => keyid === r.keyId ? { id: keyid, algs: [r.config.algorithm], verify: verifier } : null,
      all: false, tolerance: 300,
    }, { method: r.method, url: r.url, headers: r.headers });
    expect(ok === true, "http-message-signatures says " + ok);
    if (r.config.algorithm === "ed25519") await secondOpinion(r);
  },
  "sigv4": async (r) => {
    const [, credential, signed] = r.headers.authorization.match(/Credential=([^,]+), SignedHeaders=([^,]+)/);
    const [id, , region, service] = credential.split("/");
    const names = signed.split(";");
    const headers = Object.fromEntries(names.map((n) => [n, r.headers[n]]));
    const u = new URL(r.url);
    const again = aws4.sign({
      host: u.host, method: r.method, path: pathAndQuery(r.url), service, region, body: r.body, headers: { ...headers },
      extraHeadersToIgnore: Object.fromEntries(["content-length", "content-type"].filter((n) => !names.includes(n)).map((n) => [n, true])),
    }, { accessKeyId: id, secretAccessKey: r.key });
    expect((again.headers.Authorization ?? again.headers.authorization) === r.headers.authorization, "aws4 signs otherwise: " + (again.headers.Authorization ?? again.headers.authorization));
    const smithy = new SignatureV4({
      credentials: { accessKeyId: id, secretAccessKey: r.key }, region, service, sha256: Sha256,
      uriEscapePath: service !== "s3", applyChecksum: names.includes("x-amz-content-sha256"),
    });
    const date = r.headers["x-amz-date"].replace(/(....)(..)(..)T(..)(..)(..)Z/, "$1-$2-$3T$4:$5:$6Z");
    const query = {};
    for (const [k, v] of u.searchParams) query[k] = k in query ? [].concat(query[k], v) : v;
    const request = await smithy.sign({
      method: r.method, protocol: u.protocol, hostname: u.hostname, path: u.pathname, query, headers, body: r.body,
    }, { signingDate: new Date(date) });
    expect(request.headers.authorization === r.headers.authorization, "smithy signs otherwise: " + request.headers.authorization);
  },
  "jws": async (r) => {
    const [header, , signature] = r.headers[r.config.header ?? "x-jws-signature"].split(".");
    const protectedHeader = JSON.parse(Buffer.from(header, "base64url"));
    const payload = protectedHeader.b64 === false ? new Uint8Array(r.body) : r.body.toString("base64url");
    await jose.flattenedVerify({ protected: header, payload, signature }, await joseKey(r, protectedHeader.alg), { algorithms: [r.config.alg] });
  },
  "jwt": async (r) => {
    const token = r.headers.authorization.replace(/^Bearer /, "");
    const { payload } = await jose.jwtVerify(token, await joseKey(r, r.config.alg), {
      algorithms: [r.config.alg], issuer: r.config.issuer, audience: r.config.audience, requiredClaims: ["exp", "iat", "jti"],
    });
    expect(payload.jti === r.headers["webhook-id"], "jti is " + payload.jti);
  },
  "cloudevents": (r) => {
    const event = HTTP.toEvent({ headers: r.headers, body: r.text });
    event.validate();
    for (const [name, value] of Object.entries(r.config.expect)) {
      const got = name === "data" ? JSON.stringify(event.data) : String(event[name]);
      const want = name === "data" ? JSON.stringify(JSON.parse(value)) : value;
      expect(got === want, `${name} is ${got}, want ${want}`);
    }
  },
};

// secondOpinion asks the other library about the first signature.
async function secondOpinion(r) {
  const key = crypto.createPublicKey(r.key);
  await verifySignature({
    kind: "request", method: r.method, targetUri: r.url,
    fields: Object.entries(r.headers).map(([name, value]) => ({ name, value })),
  }, {
    label: r.headers["signature-input"].match(new RegExp(`(\\w+)=\\([^)]*\\)[^,]*keyid="${r.keyId}"`))[1],
    policy: { algorithms: ["ed25519"], requiredComponents: ["@method"], requiredParameters: ["created", "keyid"], maxAge: 300, clockSkew: 5 },
    resolveVerifier: () => ({ algorithm: "ed25519", verify: (data, signature) => crypto.verify(null, data, key, signature) }),
  });
}

// verifyV1a is node's own ed25519: no official library verifies v1a.
function verifyV1a(r) {
  const key = crypto.createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x: Buffer.from(r.key.slice(5), "base64").toString("base64url") }, format: "jwk" });
  const content = Buffer.concat([Buffer.from(`${r.headers["webhook-id"]}.${r.headers["webhook-timestamp"]}.`), r.body]);
  const fits = r.headers["webhook-signature"].split(" ").some((entry) =>
    entry.startsWith("v1a,") && crypto.verify(null, content, key, Buffer.from(entry.slice(4), "base64")));
  expect(fits, "no v1a fits");
}

// sharedKey is a key as text, or after base64: as bytes.
function sharedKey(text) {
  return text.startsWith("base64:") ? Buffer.from(text.slice(7), "base64") : Buffer.from(text);
}

async function joseKey(r, alg) {
  if (alg.startsWith("HS")) return sharedKey(r.key);
  return jose.importSPKI(r.key, alg);
}

console.log = console.error; // libraries may chat; standard output is for verdicts
for await (const line of readline.createInterface({ input: process.stdin })) {
  let verdict = { ok: true };
  try {
    const r = JSON.parse(line);
    r.body = Buffer.from(r.body ?? "", "base64");
    r.text = r.body.toString("utf8");
    r.config ??= {};
    if (!schemes[r.scheme]) throw new Error("no verifier for " + r.scheme);
    await schemes[r.scheme](r);
  } catch (e) {
    verdict = { ok: false, error: String(e?.message ?? e).slice(0, 500) };
  }
  process.stdout.write(JSON.stringify(verdict) + "\n");
}
