"""Publishes to Grapnel and follows what becomes of it: python3 shop.py ADDRESS NAMESPACE SERVICE_CONFIG"""
import random
import sys
import time
import uuid
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2
from grapnel.v1 import delivery_pb2, delivery_pb2_grpc, event_pb2, event_pb2_grpc

UNKNOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
           grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class GrapnelError(Exception):
    """What a server says beside OK, or that there was no answer."""

    def __init__(self, error):
        self.code, self.message = error.code(), error.details()
        self.reason, self.violations, self.retry_after = "", [], None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                for detail in status_pb2.Status.FromString(value).details:
                    self._add(detail)
        super().__init__(f"{self.message} ({self.reason or self.code.name})")

    def _add(self, detail):
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            self.reason = info.reason
        elif detail.Unpack(bad):
            self.violations = [(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            self.retry_after = retry.retry_delay.ToMilliseconds() / 1000

    def wait(self, attempt):
        """Seconds until the same call, with the same ids, may be made again; None when that is of no use."""
        backoff = min(0.1 * 2**attempt, 3) * random.uniform(0.75, 1.25)
        if self.retry_after is not None:
            return max(self.retry_after, backoff)
        return backoff if self.code in UNKNOWN else None


def call(method, request, timeout=60):
    """Makes an idempotent call until it is answered for good, for at most timeout seconds."""
    end, attempt = time.monotonic() + timeout, 0
    while True:
        try:
            return method(request, timeout=min(10, max(end - time.monotonic(), 0.1)))
        except grpc.RpcError as error:
            failure = GrapnelError(error)
            wait = failure.wait(attempt)
            if wait is None or time.monotonic() + wait > end:
                raise failure from error
            time.sleep(wait)
            attempt += 1


def new_event(type, data, id=None):
    """An event with an id: without one a repeated publish could be stored twice."""
    return event_pb2.Event(id=id or str(uuid.uuid4()), type=type, data=data, data_content_type="application/json")


def publish(service, parent, event):
    return call(service.Publish, event_pb2.PublishRequest(parent=parent, event=event))


def publish_batch(service, parent, events, timeout=60):
    """Publishes up to 500 events and 4 MiB, each on its own; returns the refusals by event id."""
    end, refused, attempt = time.monotonic() + timeout, {}, 0
    while events:
        results = call(service.BatchPublish, event_pb2.BatchPublishRequest(parent=parent, events=events)).results
        again, wait = [], 0
        for event, result in zip(events, results, strict=True):
            if not result.HasField("error"):
                continue
            if result.error.retryable and time.monotonic() < end:
                again.append(event)
                wait = max(wait, result.error.retry_delay.ToMilliseconds() / 1000, min(0.1 * 2**attempt, 3))
            else:
                refused[event.id] = f"{result.error.message} ({result.error.reason})"
        events, attempt = again, attempt + 1
        time.sleep(wait)
    return refused


def deliveries(service, parent, filter):
    """All pages; a page may be empty and not the last."""
    token = ""
    while True:
        page = call(service.ListDeliveries, delivery_pb2.ListDeliveriesRequest(
            parent=parent, filter=filter, page_size=200, page_token=token))
        yield from page.deliveries
        token = page.next_page_token
        if not token:
            return


def ended(delivery):
    d = delivery_pb2.Delivery
    return delivery.state not in (d.STATE_PENDING, d.STATE_SCHEDULED, d.STATE_IN_FLIGHT)


def main(address, namespace, service_config):
    parent = f"namespaces/{namespace}"
    channel = grpc.insecure_channel(address, options=[  # grpc.secure_channel for TLS
        ("grpc.service_config", Path(service_config).read_text()),
        ("grpc.keepalive_time_ms", 30_000),  # below 20 s the server hangs up
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_receive_message_length", 8 << 20),
    ])
    with channel:
        publisher = event_pb2_grpc.PublishServiceStub(channel)
        stored = publish(publisher, parent, new_event("order.created", b'{"order":1001}', "o-1001-created"))
        print("stored", stored.name, "webhook-id", stored.uid)
        again = publish(publisher, parent, new_event("order.created", b'{"order":1001}', "o-1001-created"))
        print("again", again.name, "duplicate", again.duplicate)

        events = [new_event("order.paid", b'{"order":%d}' % n, f"o-{n}-paid") for n in range(1, 4)]
        events.append(new_event("", b"{}", "o-4-paid"))  # no type: refused, and alone
        for id, why in publish_batch(publisher, parent, events).items():
            print("refused", id, why)

        try:
            publish(publisher, parent, new_event("order.created", b'{"order":1002}', "o-1001-created"))
        except GrapnelError as error:
            print("error", error.code.name, error.reason)

        reader = delivery_pb2_grpc.DeliveryServiceStub(channel)
        for delivery in deliveries(reader, parent, f'event = "{stored.name}"'):
            while not ended(delivery):
                time.sleep(0.1)
                delivery = call(reader.GetDelivery, delivery_pb2.GetDeliveryRequest(name=delivery.name)).delivery
            print("delivery", delivery_pb2.Delivery.State.Name(delivery.state), "after", delivery.attempt_count, "attempts")


if __name__ == "__main__":
    main(*sys.argv[1:])
