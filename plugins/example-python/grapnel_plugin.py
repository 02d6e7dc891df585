"""Grapnel's plugin protocol for Python: a signer, a transport or a transformer is one function.

It needs grpcio and protobuf (Debian: python3-grpcio, python3-protobuf) and the file plugin.binpb beside it,
which is the compiled grapnel.plugin.v1. Copy both into your project; they change only with the protocol.

    plugin = Plugin("acme/sign", "1.0.0")

    @plugin.signer("acme-v2", emits=["acme-signature"], secrets=[Slot("key", required=True)])
    def acme(config, secrets, target):
        def sign(request):
            request.set("acme-signature", mac(secrets["key"][0], request.body))
        return sign

    plugin.main()

The function above is called once for each configured instance, and when a config is only checked; what it returns is
called for each request, on several threads. A signer is pure: it takes the time from request.created and randomness
from request.nonce. A transformer is given an Event and returns Transformed, or raises Drop where nothing is to be sent; one
that computes for long holds up the others, which share one interpreter. What an instance holds it gives back in a function
that it hands to target.on_close.
"""

import heapq
import ipaddress
import json
import os
import queue
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from concurrent import futures
from pathlib import Path

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

MAGIC_COOKIE = ("GRAPNEL_PLUGIN", "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31")
PROTOCOL_MINOR = 4
_KIND_ID = re.compile(r"^[a-z][a-z0-9-]{0,62}$")
_MAX_MESSAGE = 32 << 20
_GRACE = 4.0
_WINDOW = 256  # attempts that a host sends at once over AttemptOne; it has half as many transformations unanswered
_BATCH = 64
_MAX_TRANSFORMED = 256 << 10


class Problem(Exception):
    """A complaint about a config, for people. pointer is an RFC 6901 pointer such as /config/url."""

    def __init__(self, summary, pointer="", code="config.invalid", warning=False):
        super().__init__(summary)
        self.summary, self.pointer, self.code, self.warning = summary, pointer, code, warning


class Failure(Exception):
    """An attempt that got no answer. source is "endpoint", "plugin" or "policy"; wire is "not_sent",
    "maybe_sent" or "sent" and says what may have reached the receiver."""

    def __init__(self, source, code, message, wire="maybe_sent"):
        super().__init__(message)
        self.source, self.code, self.message, self.wire = source, code, message, wire


class Drop(Exception):
    """Raised by a transformer where nothing is to be sent; the reason is for people, and shown to them."""


class Field:
    """One setting of a kind: a str, int, float or bool."""

    def __init__(self, name, type, doc="", default=None, required=False, enum=None, minimum=None, maximum=None):
        self.name, self.type, self.doc, self.default, self.required = name, type, doc, default, required
        self.enum, self.minimum, self.maximum = enum, minimum, maximum

    def schema(self):
        names = {str: "string", int: "integer", float: "number", bool: "boolean"}
        out = {"type": names[self.type]}
        pairs = {"description": self.doc or None, "default": self.default, "enum": self.enum,
                 "minimum": self.minimum, "maximum": self.maximum}
        out.update({k: v for k, v in pairs.items() if v is not None})
        return out

    def check(self, value):
        at = "/config/" + self.name.replace("~", "~0").replace("/", "~1")
        numbers = (int, float) if self.type is float else self.type
        if not isinstance(value, numbers) or (self.type is not bool and isinstance(value, bool)):
            raise Problem(f"given {json.dumps(value)}, want a {self.schema()['type']}", at, "config.type")
        if self.enum is not None and value not in self.enum:
            raise Problem(f"given {json.dumps(value)}, want one of {', '.join(map(str, self.enum))}", at, "config.enum")
        if self.minimum is not None and value < self.minimum:
            raise Problem(f"given {value}, want at least {self.minimum}", at, "config.range")
        if self.maximum is not None and value > self.maximum:
            raise Problem(f"given {value}, want at most {self.maximum}", at, "config.range")


class Slot:
    """One secret that a kind takes. With format, values are checked by read(bytes), which raises Problem
    and may return the canonical form; with generate(algorithm) the server can make one."""

    def __init__(self, name, doc="", required=False, format="", algorithms=(), generate=None, read=None):
        self.name, self.doc, self.required, self.format = name, doc, required, format
        self.algorithms, self.generate, self.read = list(algorithms), generate, read


class Secret(list):
    """The live versions of a secret as bytes, newest first. It prints as [redacted]."""

    def __repr__(self):
        return "[redacted]"

    __str__ = __repr__


class Request:
    """What is to be signed and sent. Header names are lower case; body is bytes."""

    def __init__(self, message_id, created, nonce, method, url, headers, body, timeout=15.0, attempt_number=1,
                 traceparent="", max_response_body=4096, ownership_check=False, event_type=""):
        self.message_id, self.created, self.nonce = message_id, created, nonce
        self.method, self.url, self.headers, self.body = method, url, headers, body
        self.timeout, self.attempt_number, self.traceparent = timeout, attempt_number, traceparent
        self.max_response_body, self.ownership_check, self.event_type = max_response_body, ownership_check, event_type

    def get(self, name):
        return next((v for n, v in self.headers if n == name.lower()), "")

    def set(self, name, value):
        self.headers[:] = [(n, v) for n, v in self.headers if n != name.lower()]
        self.headers.append((name.lower(), str(value)))


class Response:
    """The receiver's answer; transports other than HTTP map theirs onto HTTP's status codes."""

    def __init__(self, status, headers=(), body=b"", peer=""):
        self.status, self.headers, self.body, self.peer = status, list(headers), body, peer


class Event:
    """What a transformer makes something of, as it was published: data is bytes, time is in seconds, attributes are str
    by name. timeout is how many seconds are left."""

    def __init__(self, message_id, id, source, type, subject, time, content_type, data_schema, attributes, data, timeout):
        self.message_id, self.id, self.source, self.type, self.subject, self.time = message_id, id, source, type, subject, time
        self.content_type, self.data_schema, self.attributes, self.data, self.timeout = content_type, data_schema, attributes, data, timeout

    def json(self):
        """The payload, which may be none: then it raises ValueError, which fails the transformation."""
        try:
            return json.loads(self.data)
        except (ValueError, RecursionError):
            raise ValueError("the payload is not JSON") from None


class Transformed:
    """What is sent instead of the payload: body is bytes or str, 256 KiB at most; headers are pairs of name and value."""

    def __init__(self, body, content_type="application/json", headers=()):
        self.body, self.content_type, self.headers = body, content_type, list(headers)


class Target:
    """Where an instance's requests go. egress says which addresses may be connected to."""

    def __init__(self, method, url, headers, egress, user_agent):
        self.method, self.url, self.headers, self.egress, self.user_agent = method, url, headers, egress, user_agent
        self._closers = []

    def on_close(self, close):
        """Has close() called at the end of the instance that is being built, the last given first: when it is removed
        and its last attempt has ended, at once when it was built for a check alone, or when the process ends."""
        self._closers.append(close)


class Egress:
    """Public addresses are open on ports 80, 443, 8080 and 8443; the server's allow list on every port, its deny list never."""

    def __init__(self, allow=(), deny=()):
        self.allow = [ipaddress.ip_network(p) for p in allow]
        self.deny = []  # (range, port or 0)
        for rule in deny:
            address, rest = rule.split("/", 1)
            bits, _, port = rest.partition(":")
            self.deny.append((ipaddress.ip_network(f"{address}/{bits}"), int(port or 0)))

    def allows(self, host, port):
        ip = ipaddress.ip_address(host.split("%")[0])
        carried = [ip] + [i for i in (getattr(ip, n, None) for n in ("ipv4_mapped", "sixtofour")) if i]
        if any(i in n and p in (0, port) for i in carried for n, p in self.deny if i.version == n.version):
            return False
        if any(i in n for i in carried for n in self.allow if i.version == n.version):
            return True
        return port in (80, 443, 8080, 8443) and all(i.is_global and not i.is_multicast for i in carried)

    def connect(self, host, port, timeout):
        """Connects to an address that is allowed; the check is made on the address itself."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror:
            raise Failure("endpoint", "dns", "the host name could not be looked up", "not_sent") from None
        last = Failure("policy", "egress", "blocked by egress policy", "not_sent")
        for family, kind, proto, _, address in found:
            if not self.allows(address[0], address[1]):
                continue
            s = socket.socket(family, kind, proto)
            s.settimeout(timeout)
            try:
                s.connect(address)
                return s
            except socket.timeout:
                last = Failure("endpoint", "timeout", "no connection in time", "not_sent")
            except OSError as e:
                last = Failure("endpoint", "connect", os.strerror(e.errno or 0).lower(), "not_sent")
            s.close()
        raise last


class _Kind:
    def __init__(self, id, role, build, config, secrets, emits, schemes, doc, example, deterministic):
        if not _KIND_ID.match(id):
            raise ValueError(f"kind {id!r}: the id must match {_KIND_ID.pattern}")
        self.id, self.role, self.build, self.fields, self.slots = id, role, build, config, secrets
        self.emits, self.schemes, self.doc, self.deterministic = [h.lower() for h in emits], schemes, doc, deterministic
        self.example = example if example is not None else {}

    def describe(self, pb):
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False,
            "properties": {f.name: f.schema() for f in self.fields},
            "required": [f.name for f in self.fields if f.required],
        }
        kind = pb["Kind"](id=self.id, description=self.doc, config_schema=json.dumps(schema),
                          config_example=json.dumps(self.example))
        for s in self.slots:
            kind.secret_slots.add(name=s.name, description=s.doc, required=s.required, format=s.format, algorithms=s.algorithms)
        if self.role == "signer":
            kind.signer.emits_headers.extend(self.emits)
            kind.signer.deterministic = self.deterministic
        elif self.role == "transformer":
            kind.transformer.SetInParent()
        else:
            kind.transport.uri_schemes.extend(self.schemes)
            kind.transport.may_add_headers.extend(self.emits)
        return kind

    def config(self, raw):
        """Checks the shape, fills in defaults, and returns problems instead where there are any."""
        try:
            given = json.loads(raw or b"{}")
        except (ValueError, RecursionError):
            return None, [Problem("the config is not JSON", "/config", "config.syntax")]
        if not isinstance(given, dict):
            return None, [Problem("want a JSON object", "/config", "config.type")]
        problems, known = [], {f.name: f for f in self.fields}
        for name in given:
            if name not in known:
                at = "/config/" + name.replace("~", "~0").replace("/", "~1")
                problems.append(Problem(f"there is no field {name!r}; there are {', '.join(known) or 'none'}", at, "config.unknown_field"))
        out = {}
        for f in self.fields:
            if f.name not in given:
                out[f.name] = f.default
                if f.required:
                    problems.append(Problem(f"field {f.name!r} is missing and required", "/config/" + f.name, "config.missing"))
                continue
            try:
                f.check(given[f.name])
                out[f.name] = given[f.name]
            except Problem as p:
                problems.append(p)
        return out, problems


class _Instance:
    def __init__(self, id, run, target, values):
        self.id, self.run, self.target, self.values = id, run, target, values
        self._lock, self._users, self._retired = threading.Lock(), 0, False

    def use(self, request):
        """Runs it, and closes it if it was removed meanwhile."""
        with self._lock:
            self._users += 1
        try:
            return self.run(request)
        finally:
            with self._lock:
                self._users -= 1
                over = self._retired and self._users == 0
            if over:
                _close(self.target)

    def retire(self):
        with self._lock:
            over = not self._retired and self._users == 0
            self._retired = True
        if over:
            _close(self.target)


class Plugin:
    """A plugin process. Register kinds with signer, transport and transformer, then call main."""

    def __init__(self, name, version):
        self.name, self.version, self.kinds = name, version, {}
        self._pb = _messages()
        self._lock = threading.Lock()
        self._instances, self._newest = {}, {}
        self._egress, self._agent = Egress(), "grapnel"
        self._in_flight = 0
        self._attempts = futures.ThreadPoolExecutor(max_workers=_WINDOW)
        self._transforms = futures.ThreadPoolExecutor(max_workers=_WINDOW)
        self._host_seen, self._host_gone = threading.Event(), threading.Event()

    def signer(self, id, emits, config=(), secrets=(), doc="", example=None, deterministic=True):
        return self._register(id, "signer", config, secrets, emits, (), doc, example, deterministic)

    def transport(self, id, schemes=(), config=(), secrets=(), adds=(), doc="", example=None):
        return self._register(id, "transport", config, secrets, adds, schemes, doc, example, True)

    def transformer(self, id, config=(), secrets=(), doc="", example=None):
        return self._register(id, "transformer", config, secrets, (), (), doc, example, True)

    def _register(self, id, role, config, secrets, emits, schemes, doc, example, deterministic):
        def add(build):
            self.kinds[id] = _Kind(id, role, build, list(config), list(secrets), list(emits), list(schemes), doc, example, deterministic)
            return build
        return add

    def main(self):
        """Serves until the host is gone, then exits the process."""
        if os.environ.get(MAGIC_COOKIE[0]) != MAGIC_COOKIE[1]:
            print(f"{self.name} {self.version}: this program is a Grapnel plugin and is started by the Grapnel server", file=sys.stderr)
            sys.exit(1)
        # The host says when to stop; a signal to the whole group must not cut its drain short.
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, lambda *_: None if self._host_seen.is_set() else os._exit(0))
        directory = os.environ.get("PLUGIN_UNIX_SOCKET_DIR") or tempfile.mkdtemp()
        path = os.path.join(directory, f"plugin{os.getpid()}")
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=_WINDOW + 8), options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.max_send_message_length", _MAX_MESSAGE)])
        server.add_generic_rpc_handlers(self._handlers())
        server.add_insecure_port("unix:" + path)
        server.start()
        os.write(1, f"1|1|unix|{path}|grpc|\n".encode())
        os.dup2(2, 1)  # standard output belonged to the handshake
        parent = os.getppid()
        while not self._host_gone.wait(1.0):
            if os.getppid() != parent:
                break
        server.stop(_GRACE).wait()
        with self._lock:
            left = list(self._instances.values())
        for instance in left:
            instance.retire()
        sys.stderr.flush()
        os._exit(0)

    def _handlers(self):
        pb = self._pb

        def unary(fn, request, response):
            return grpc.unary_unary_rpc_method_handler(fn, pb[request].FromString, pb[response].SerializeToString)

        def stream(fn, request, response):
            return grpc.stream_stream_rpc_method_handler(fn, pb[request].FromString, pb[response].SerializeToString)

        base = "grapnel.plugin.v1."
        return (
            grpc.method_handlers_generic_handler(base + "PluginService", {
                "Describe": unary(self._describe, "DescribeRequest", "DescribeResponse"),
                "Validate": unary(self._validate, "ValidateRequest", "ValidateResponse"),
                "Configure": unary(self._configure, "ConfigureRequest", "ConfigureResponse"),
                "Remove": unary(self._remove, "RemoveRequest", "RemoveResponse"),
                "PrepareSecret": unary(self._prepare, "PrepareSecretRequest", "PrepareSecretResponse"),
                "Control": stream(self._control, "ControlRequest", "ControlResponse"),
            }),
            grpc.method_handlers_generic_handler(base + "SignerService", {
                "Sign": stream(self._sign, "SignRequest", "SignResponse"),
            }),
            grpc.method_handlers_generic_handler(base + "TransportService", {
                "AttemptOne": unary(self._attempt_one, "AttemptOneRequest", "AttemptOneResponse"),
            }),
            grpc.method_handlers_generic_handler(base + "TransformerService", {
                "Transform": stream(self._transform, "TransformRequest", "TransformResponse"),
            }),
        )

    # PluginService

    def _describe(self, request, context):
        roles = {k.role for k in self.kinds.values()}
        names = {"signer": "sign.stream", "transport": "attempt.unary", "transformer": "transform.stream"}
        capabilities = [name for role, name in names.items() if role in roles]
        if any(s.format for k in self.kinds.values() for s in k.slots):
            capabilities.append("secret.prepare")
        return self._pb["DescribeResponse"](name=self.name, version=self.version, protocol_minor=PROTOCOL_MINOR,
                                            capabilities=capabilities, kinds=[k.describe(self._pb) for k in self.kinds.values()])

    def _validate(self, request, context):
        instance, problems = self._build(request.instance, validate=True)
        if instance is not None:
            instance.retire()
        return self._pb["ValidateResponse"](diagnostics=self._diagnostics(problems, _values(request.instance)))

    def _configure(self, request, context):
        out = self._pb["ConfigureResponse"]()
        with self._lock:
            if request.HasField("settings"):
                self._egress, self._agent = Egress(request.settings.egress_allow, request.settings.egress_deny), request.settings.user_agent
            for given in request.instances:
                status = out.statuses.add(ref=given.ref)
                newest, refs = self._newest.get(given.id, (0, set()))
                if given.generation < newest:
                    problems = [Problem(f"generation {given.generation} is older than {newest}", code="config.stale")]
                    instance = None
                else:
                    instance, problems = self._build(given, validate=False)
                status.diagnostics.extend(self._diagnostics(problems, _values(given)))
                if instance is not None:
                    replaced = self._instances.get(given.ref)
                    self._instances[given.ref] = instance
                    if replaced is not None:
                        replaced.retire()
                    self._newest[given.id] = (given.generation, refs | {given.ref})
        return out

    def _remove(self, request, context):
        with self._lock:
            for ref in request.refs:
                gone = self._instances.pop(ref, None)
                if gone is None:
                    continue
                gone.retire()
                newest, refs = self._newest[gone.id]
                refs.discard(ref)
                if not refs:
                    del self._newest[gone.id]
        return self._pb["RemoveResponse"]()

    def _prepare(self, request, context):
        out, value = self._pb["PrepareSecretResponse"](), bytes(request.value)
        try:
            kind = self.kinds.get(request.kind)
            slot = next((s for s in kind.slots if s.name == request.slot), None) if kind else None
            if slot is None:
                raise Problem(f"there is no secret slot {request.slot!r} of {request.kind!r}", code="secret.unknown_slot")
            if not value:
                if not slot.generate:
                    raise Problem("a value must be given: none can be made", "/value", "secret.required")
                algorithm = request.algorithm or slot.algorithms[0]
                if algorithm not in slot.algorithms:
                    raise Problem(f"given {algorithm!r}, want one of {', '.join(slot.algorithms)}", "/algorithm", "secret.algorithm")
                value = slot.generate(algorithm)
            try:
                value = (slot.read(value) if slot.read else None) or value
            except Problem as p:
                raise Problem(p.summary, "/value", "secret.malformed") from None
            out.value = value
        except Problem as p:
            out.diagnostics.extend(self._diagnostics([p], [value]))
        return out

    def _control(self, frames, context):
        self._host_seen.set()
        try:
            for frame in frames:
                if frame.HasField("heartbeat"):
                    out = self._pb["ControlResponse"]()
                    out.heartbeat.number, out.heartbeat.in_flight = frame.heartbeat.number, self._in_flight
                    yield out
        except grpc.RpcError:
            pass
        finally:
            self._host_gone.set()

    def _build(self, given, validate):
        kind = self.kinds.get(given.kind)
        if kind is None:
            return None, [Problem(f"{self.name} offers no kind {given.kind!r}", code="config.unknown_kind")]
        config, problems = kind.config(given.config_json)
        secrets, shape_only = {}, False
        names = {s.name for s in kind.slots}
        for name in given.secrets:
            if name not in names:
                problems.append(Problem(f"there is no secret slot {name!r}; there are {', '.join(sorted(names)) or 'none'}",
                                        "/secrets/" + name, "secret.unknown_slot"))
        now = time.time()
        for slot in kind.slots:
            versions = given.secrets[slot.name].versions if slot.name in given.secrets else []
            live = Secret(v.value for v in versions if not v.HasField("expire_time") or v.expire_time.seconds > now)
            if slot.required and not live:
                shape_only = shape_only or validate
                if not validate:
                    problems.append(Problem(f"secret slot {slot.name!r} is empty and required", "/secrets/" + slot.name, "secret.missing"))
            for value in live:
                try:
                    if slot.read:
                        slot.read(value)
                except Problem as p:
                    problems.append(Problem(p.summary, "/secrets/" + slot.name, "secret.malformed"))
            secrets[slot.name] = live
        if shape_only or any(not p.warning for p in problems):
            return None, problems
        target = Target(given.target.method, given.target.uri, [(h.name.lower(), h.value) for h in given.target.headers],
                        self._egress, self._agent)
        try:
            run = kind.build(config, secrets, target)
        except Problem as p:
            _close(target)
            return None, problems + [p]
        except Exception:
            _close(target)
            traceback.print_exc()
            return None, problems + [Problem("the plugin failed on this config", code="panic")]
        return _Instance(given.id, run, target, _values(given)), problems

    def _diagnostics(self, problems, values):
        return [self._pb["Diagnostic"](severity=2 if p.warning else 1, code=p.code, pointer=p.pointer,
                                       summary=_redact(p.summary, values)) for p in problems]

    # SignerService, TransportService and TransformerService

    def _sign(self, requests, context):
        for request in requests:
            out = self._pb["SignResponse"]()
            for item in request.items:
                result = out.results.add(seq=item.seq)
                instance = self._instances.get(item.instance_ref)
                if instance is None:
                    self._fail(result.failure, _stale(item.instance_ref), [])
                    continue
                if item.content >= len(request.contents):
                    self._fail(result.failure, Failure("plugin", "protocol", "no such content", "not_sent"), [])
                    continue
                content = request.contents[item.content]
                r = self._request(instance, content, item.created.seconds + item.created.nanos / 1e9, item.nonce, item.headers)
                r.url = given = item.uri or r.url
                before = len(r.headers)
                try:
                    instance.use(r)
                except Exception as e:
                    self._fail(result.failure, _sign_failure(e), instance.values)
                    continue
                for name, value in r.headers[before:]:
                    result.headers.add(name=name, value=value)
                if r.url != given:
                    result.uri = r.url
            yield out

    def _attempt_one(self, request, context):
        began, a = time.monotonic(), request.attempt
        out = self._pb["AttemptOneResponse"]()
        out.result.seq = a.seq
        with self._lock:
            self._in_flight += 1
        values = []
        try:
            r = self._run_attempt(request, a, out.result, values, context)
        except Failure as f:
            self._fail(out.result.failure, f, values)
        except Exception as e:
            traceback.print_exc()
            self._fail(out.result.failure, Failure("plugin", "panic", f"the plugin failed: {type(e).__name__}"), values)
        finally:
            with self._lock:
                self._in_flight -= 1
        out.result.total_us = int((time.monotonic() - began) * 1e6)
        return out

    def _run_attempt(self, request, a, result, values, context):
        instance = self._instances.get(a.instance_ref)
        if instance is None:
            raise _stale(a.instance_ref)
        values += instance.values
        r = self._request(instance, request.content, a.created_unix_nano / 1e9, a.nonce, a.headers)
        r.url = a.uri or r.url
        r.timeout = a.timeout_ms / 1000 or 15.0
        r.attempt_number, r.traceparent = a.attempt_number, a.traceparent
        r.max_response_body, r.ownership_check = request.max_response_body, a.ownership_check
        before = len(r.headers) - len(a.headers)
        for ref in a.sign_here:
            signer = self._instances.get(ref)
            if signer is None:
                raise _stale(ref)
            values += signer.values
            try:
                signer.use(r)
            except Exception as e:
                raise _sign_failure(e) from None
        try:
            # On a thread of its own: an attempt that overstays its time costs itself, not the process.
            answer = self._attempts.submit(instance.use, r).result(r.timeout + 0.25)
        except futures.TimeoutError:
            raise Failure("endpoint", "timeout", "no answer in time") from None
        finally:
            added = [(n, v) for n, v in r.headers[before:] if not re.search("authorization|cookie|token|secret|password|api-?key", n)]
        if answer.status < 200 or answer.status > 299:
            for name, value in added:
                result.sent_headers.add(name=name, value=value)
        kept = [(n.lower(), v) for n, v in answer.headers if answer.status > 299 or n.lower() == "retry-after"]
        result.peer = answer.peer
        result.response.status = answer.status
        for name, value in kept:
            result.response.headers.add(name=name, value=value)
        result.response.body = answer.body[:r.max_response_body]
        result.response.body_truncated = len(answer.body) > r.max_response_body

    def _request(self, instance, content, created, nonce, headers):
        t = instance.target
        r = Request(content.message_id, created, nonce, t.method, t.url, [(h.name.lower(), h.value) for h in content.headers], content.body,
                    event_type=content.event_type)
        for name, value in t.headers:
            r.set(name, value)
        r.headers.extend((h.name.lower(), h.value) for h in headers)
        return r

    def _transform(self, requests, context):
        """Reads on one thread, works on others, and answers here: what is ready, and what has had its time."""
        done = queue.SimpleQueue()  # results; None when the host sends no more
        context.add_callback(lambda: done.put(None))

        def read():
            try:
                for request in requests:
                    now = time.monotonic()
                    for item in request.items:
                        done.put((item, now + (item.timeout_ms or 15000) / 1000))  # before its result can come
                        event = request.events[item.event] if item.event < len(request.events) else None
                        self._transforms.submit(work, item, event, now + (item.timeout_ms or 15000) / 1000)
            except Exception:
                pass  # the call is over
            finally:
                done.put(None)

        def work(item, event, until):
            left = until - time.monotonic()
            if left > 0:
                done.put(self._transform_item(item, event, left))

        threading.Thread(target=read, daemon=True).start()
        deadlines, waiting, more = [], {}, True
        while more or waiting:
            while deadlines and deadlines[0][1] not in waiting:
                heapq.heappop(deadlines)
            news = []
            try:
                news.append(done.get(timeout=max(0.001, deadlines[0][0] - time.monotonic()) if deadlines else None))
                while len(news) < _BATCH:
                    news.append(done.get_nowait())
            except queue.Empty:
                pass
            out = self._pb["TransformResponse"]()
            for one in news:
                if one is None:
                    more = False
                elif isinstance(one, tuple):
                    item, until = one
                    waiting[item.seq] = item
                    heapq.heappush(deadlines, (until, item.seq))
                elif waiting.pop(one.seq, None) is not None:
                    out.results.append(one)
            now = time.monotonic()
            while deadlines and deadlines[0][0] <= now:
                _, seq = heapq.heappop(deadlines)
                if waiting.pop(seq, None) is not None:
                    self._fail(out.results.add(seq=seq).failure, Failure("plugin", "timeout", "the transformation took too long", "not_sent"), [])
            if out.results:
                yield out
            if not context.is_active():
                return

    def _transform_item(self, item, e, left):
        out = self._pb["TransformResult"](seq=item.seq)
        instance = self._instances.get(item.instance_ref)
        if instance is None:
            self._fail(out.failure, _stale(item.instance_ref), [])
            return out
        if e is None:
            self._fail(out.failure, Failure("plugin", "protocol", "no such event", "not_sent"), [])
            return out
        event = Event(e.message_id, e.id, e.source, e.type, e.subject, e.time.seconds + e.time.nanos / 1e9, e.content_type, e.data_schema,
                      dict(e.attributes), e.data, left)
        try:
            made = instance.use(event)
            body = made.body.encode() if isinstance(made.body, str) else bytes(made.body)
            if len(body) > _MAX_TRANSFORMED:
                raise ValueError(f"the body has {len(body)} bytes; at most {_MAX_TRANSFORMED} can be sent")
            out.transformed.body, out.transformed.content_type = body, made.content_type
            for name, value in made.headers:
                out.transformed.headers.add(name=name.lower(), value=str(value))
        except Drop as d:
            out.dropped.reason = _redact(str(d) or "no reason was given", instance.values)
        except Exception as problem:
            self._fail(out.failure, _transform_failure(problem), instance.values)
        return out

    def _fail(self, failure, f, values):
        failure.source = {"endpoint": 1, "plugin": 2, "policy": 3, "config": 4}[f.source]
        failure.wire_state = {"not_sent": 1, "maybe_sent": 2, "sent": 3}[f.wire]
        failure.code, failure.message = f.code, _redact(f.message, values)


def _close(target):
    while target._closers:
        try:
            target._closers.pop()()
        except Exception:
            traceback.print_exc()


def _stale(ref):
    return Failure("config", "config", f"no instance with ref {ref}", "not_sent")


def _sign_failure(e):
    return Failure("plugin", "sign", str(e) or type(e).__name__, "not_sent")


def _transform_failure(e):
    if isinstance(e, Failure):
        return Failure("plugin", e.code, e.message, "not_sent")
    text = str(e) if isinstance(e, ValueError) and str(e) else f"{type(e).__name__}: {e}"
    return Failure("plugin", "transform", text, "not_sent")


def _values(instance):
    return [v.value for versions in instance.secrets.values() for v in versions.versions]


def _redact(text, values):
    for v in values:
        v = v.decode("utf-8", "replace")
        if len(v) >= 6:
            text = text.replace(v, "[redacted]")
    return text


def _messages():
    """The message classes of grapnel.plugin.v1, by name, made at start: no generated code to keep in step."""
    files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("plugin.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for f in files.file:
        pool.Add(f)
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    package = "grapnel.plugin.v1"
    file = next(f for f in files.file if f.package == package)
    return {m.name: make(pool.FindMessageTypeByName(package + "." + m.name)) for m in file.message_type}
