import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import grapnel.v1.DeliveryOuterClass.Delivery;
import grapnel.v1.DeliveryOuterClass.GetDeliveryRequest;
import grapnel.v1.DeliveryOuterClass.ListDeliveriesRequest;
import grapnel.v1.DeliveryServiceGrpc;
import grapnel.v1.EventOuterClass.BatchPublishRequest;
import grapnel.v1.EventOuterClass.Event;
import grapnel.v1.EventOuterClass.PublishRequest;
import grapnel.v1.EventOuterClass.PublishResponse;
import grapnel.v1.PublishServiceGrpc;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.ArrayList;
import java.util.EnumSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/** Publishes to Grapnel and follows what becomes of it: Shop ADDRESS NAMESPACE. */
public final class Shop {
  private static final Set<Status.Code> UNKNOWN = EnumSet.of(Status.Code.UNAVAILABLE, Status.Code.DEADLINE_EXCEEDED,
      Status.Code.CANCELLED, Status.Code.INTERNAL, Status.Code.UNKNOWN);
  private static final Set<Delivery.State> OPEN = EnumSet.of(Delivery.State.STATE_PENDING,
      Delivery.State.STATE_SCHEDULED, Delivery.State.STATE_IN_FLIGHT);

  /** What a server says beside OK, or that there was no answer. */
  static final class GrapnelException extends RuntimeException {
    final Status.Code code;
    String reason = "";
    long retryAfterMillis = -1;

    GrapnelException(StatusRuntimeException cause) {
      super(cause.getMessage(), cause);
      code = cause.getStatus().getCode();
      com.google.rpc.Status status = StatusProto.fromThrowable(cause); // null when the server did not answer
      if (status == null) {
        return;
      }
      try {
        for (Any detail : status.getDetailsList()) {
          if (detail.is(ErrorInfo.class)) {
            reason = detail.unpack(ErrorInfo.class).getReason();
          } else if (detail.is(RetryInfo.class)) {
            var delay = detail.unpack(RetryInfo.class).getRetryDelay();
            retryAfterMillis = delay.getSeconds() * 1000 + delay.getNanos() / 1_000_000;
          }
        }
      } catch (InvalidProtocolBufferException e) {
        addSuppressed(e);
      }
    }

    /** Until the same call, with the same ids, may be made again; negative when that is of no use. */
    long waitMillis(int attempt) {
      long backoff = (long) (Math.min(100L << Math.min(attempt, 5), 3000) * ThreadLocalRandom.current().nextDouble(0.75, 1.25));
      if (retryAfterMillis >= 0) {
        return Math.max(retryAfterMillis, backoff);
      }
      return UNKNOWN.contains(code) ? backoff : -1;
    }
  }

  /** Makes an idempotent call until it is answered for good, for at most a minute. */
  static <T> T call(Supplier<T> once) throws InterruptedException {
    long end = System.nanoTime() + TimeUnit.MINUTES.toNanos(1);
    for (int attempt = 0; ; attempt++) {
      try {
        return once.get();
      } catch (StatusRuntimeException e) {
        var failure = new GrapnelException(e);
        long wait = failure.waitMillis(attempt);
        if (wait < 0 || System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(wait) > end) {
          throw failure;
        }
        Thread.sleep(wait);
      }
    }
  }

  /** An event with an id: without one a repeated publish could be stored twice. */
  static Event newEvent(String type, String json, String id) {
    return Event.newBuilder().setId(id == null ? UUID.randomUUID().toString() : id).setType(type)
        .setData(ByteString.copyFromUtf8(json)).setDataContentType("application/json").build();
  }

  private final String parent;
  private final PublishServiceGrpc.PublishServiceBlockingStub publisher;
  private final DeliveryServiceGrpc.DeliveryServiceBlockingStub reader;

  Shop(ManagedChannel channel, String namespace) {
    parent = "namespaces/" + namespace;
    publisher = PublishServiceGrpc.newBlockingStub(channel);
    reader = DeliveryServiceGrpc.newBlockingStub(channel);
  }

  PublishResponse publish(Event event) throws InterruptedException {
    var request = PublishRequest.newBuilder().setParent(parent).setEvent(event).build();
    return call(() -> publisher.withDeadlineAfter(10, TimeUnit.SECONDS).publish(request));
  }

  /** Publishes up to 500 events and 4 MiB, each on its own; returns the refusals by event id. */
  Map<String, String> publishBatch(List<Event> events) throws InterruptedException {
    long end = System.nanoTime() + TimeUnit.MINUTES.toNanos(1);
    var refused = new LinkedHashMap<String, String>();
    for (int attempt = 0; !events.isEmpty(); attempt++) {
      var request = BatchPublishRequest.newBuilder().setParent(parent).addAllEvents(events).build();
      var results = call(() -> publisher.withDeadlineAfter(10, TimeUnit.SECONDS).batchPublish(request)).getResultsList();
      if (results.size() != events.size()) {
        throw new IllegalStateException("the server did not answer every event");
      }
      var again = new ArrayList<Event>();
      long wait = 0;
      for (int k = 0; k < results.size(); k++) {
        if (!results.get(k).hasError()) {
          continue;
        }
        var error = results.get(k).getError();
        if (error.getRetryable() && System.nanoTime() < end) {
          again.add(events.get(k));
          long asked = error.getRetryDelay().getSeconds() * 1000 + error.getRetryDelay().getNanos() / 1_000_000;
          wait = Math.max(wait, Math.max(asked, Math.min(100L << Math.min(attempt, 5), 3000)));
        } else {
          refused.put(events.get(k).getId(), error.getMessage() + " (" + error.getReason() + ")");
        }
      }
      events = again;
      Thread.sleep(wait);
    }
    return refused;
  }

  /** All pages; a page may be empty and not the last. */
  List<Delivery> deliveries(String filter) throws InterruptedException {
    var all = new ArrayList<Delivery>();
    var request = ListDeliveriesRequest.newBuilder().setParent(parent).setFilter(filter).setPageSize(200);
    do {
      var page = call(() -> reader.withDeadlineAfter(10, TimeUnit.SECONDS).listDeliveries(request.build()));
      all.addAll(page.getDeliveriesList());
      request.setPageToken(page.getNextPageToken());
    } while (!request.getPageToken().isEmpty());
    return all;
  }

  Delivery await(Delivery delivery) throws InterruptedException {
    var request = GetDeliveryRequest.newBuilder().setName(delivery.getName()).build();
    while (OPEN.contains(delivery.getState())) {
      Thread.sleep(100);
      delivery = call(() -> reader.withDeadlineAfter(10, TimeUnit.SECONDS).getDelivery(request)).getDelivery();
    }
    return delivery;
  }

  public static void main(String[] args) throws InterruptedException {
    ManagedChannel channel = ManagedChannelBuilder.forTarget(args[0])
        .usePlaintext() // leave it out for TLS
        .keepAliveTime(30, TimeUnit.SECONDS) // below 20 s the server hangs up
        .keepAliveTimeout(10, TimeUnit.SECONDS)
        .maxInboundMessageSize(8 << 20)
        .build();
    try {
      var shop = new Shop(channel, args[1]);
      var stored = shop.publish(newEvent("order.created", "{\"order\":1001}", "o-1001-created"));
      System.out.println("stored " + stored.getName() + " webhook-id " + stored.getUid());
      var again = shop.publish(newEvent("order.created", "{\"order\":1001}", "o-1001-created"));
      System.out.println("again " + again.getName() + " duplicate " + again.getDuplicate());

      var events = new ArrayList<Event>();
      for (int n = 1; n <= 3; n++) {
        events.add(newEvent("order.paid", "{\"order\":" + n + "}", "o-" + n + "-paid"));
      }
      events.add(newEvent("", "{}", "o-4-paid")); // no type: refused, and alone
      shop.publishBatch(events).forEach((id, why) -> System.out.println("refused " + id + " " + why));

      try {
        shop.publish(newEvent("order.created", "{\"order\":1002}", "o-1001-created"));
      } catch (GrapnelException e) {
        System.out.println("error " + e.code + " " + e.reason);
      }

      for (Delivery delivery : shop.deliveries("event = \"" + stored.getName() + "\"")) {
        delivery = shop.await(delivery);
        System.out.println("delivery " + delivery.getState() + " after " + delivery.getAttemptCount() + " attempts");
      }
    } finally {
      channel.shutdownNow();
    }
  }
}
