using Google.Protobuf;
using Google.Rpc;
using Grapnel.V1;
using Grpc.Core;
using Grpc.Net.Client;

// Publishes to Grapnel and follows what becomes of it: dotnet run ADDRESS NAMESPACE, where ADDRESS is http://HOST:PORT
var channel = GrpcChannel.ForAddress(args[0], new GrpcChannelOptions
{
    MaxReceiveMessageSize = 8 << 20,
    HttpHandler = new SocketsHttpHandler
    {
        KeepAlivePingDelay = TimeSpan.FromSeconds(30), // below 20 s the server hangs up
        KeepAlivePingTimeout = TimeSpan.FromSeconds(10),
        EnableMultipleHttp2Connections = true,
    },
});
using (channel)
{
    var shop = new Shop(channel, args[1]);
    var stored = await shop.PublishAsync(Shop.NewEvent("order.created", """{"order":1001}""", "o-1001-created"));
    Console.WriteLine($"stored {stored.Name} webhook-id {stored.Uid}");
    var again = await shop.PublishAsync(Shop.NewEvent("order.created", """{"order":1001}""", "o-1001-created"));
    Console.WriteLine($"again {again.Name} duplicate {again.Duplicate}");

    var events = Enumerable.Range(1, 3).Select(n => Shop.NewEvent("order.paid", $$"""{"order":{{n}}}""", $"o-{n}-paid")).ToList();
    events.Add(Shop.NewEvent("", "{}", "o-4-paid")); // no type: refused, and alone
    foreach (var (id, why) in await shop.PublishBatchAsync(events))
        Console.WriteLine($"refused {id} {why}");

    try
    {
        await shop.PublishAsync(Shop.NewEvent("order.created", """{"order":1002}""", "o-1001-created"));
    }
    catch (GrapnelException e)
    {
        Console.WriteLine($"error {e.Code} {e.Reason}");
    }

    await foreach (var delivery in shop.DeliveriesAsync($"event = \"{stored.Name}\""))
    {
        var final = await shop.WaitAsync(delivery);
        Console.WriteLine($"delivery {final.State} after {final.AttemptCount} attempts");
    }
}

/// <summary>What a server says beside OK, or that there was no answer.</summary>
sealed class GrapnelException : Exception
{
    static readonly StatusCode[] Unknown =
        [StatusCode.Unavailable, StatusCode.DeadlineExceeded, StatusCode.Cancelled, StatusCode.Internal, StatusCode.Unknown];

    public StatusCode Code { get; }
    public string Reason { get; } = "";
    public TimeSpan? RetryAfter { get; }

    public GrapnelException(RpcException cause) : base(cause.Status.Detail, cause)
    {
        Code = cause.StatusCode;
        var status = cause.GetRpcStatus(); // of the package Grpc.StatusProto; null when the server did not answer
        Reason = status?.GetDetail<ErrorInfo>()?.Reason ?? "";
        RetryAfter = status?.GetDetail<RetryInfo>()?.RetryDelay?.ToTimeSpan();
    }

    /// <summary>Until the same call, with the same ids, may be made again; null when that is of no use.</summary>
    public TimeSpan? Wait(int attempt)
    {
        var backoff = Shop.Backoff(attempt) * (0.75 + Random.Shared.NextDouble() / 2);
        if (RetryAfter is { } asked)
            return asked > backoff ? asked : backoff;
        return Unknown.Contains(Code) ? backoff : null;
    }
}

sealed class Shop(ChannelBase channel, string ns)
{
    readonly string parent = $"namespaces/{ns}";
    readonly PublishService.PublishServiceClient publisher = new(channel);
    readonly DeliveryService.DeliveryServiceClient reader = new(channel);

    public static TimeSpan Backoff(int attempt) => TimeSpan.FromMilliseconds(Math.Min(100 * Math.Pow(2, attempt), 3000));

    /// <summary>Makes an idempotent call until it is answered for good, for at most a minute.</summary>
    static async Task<T> CallAsync<T>(Func<DateTime, AsyncUnaryCall<T>> once)
    {
        var end = DateTime.UtcNow.AddMinutes(1);
        for (var attempt = 0; ; attempt++)
        {
            try
            {
                return await once(DateTime.UtcNow.AddSeconds(10));
            }
            catch (RpcException e)
            {
                var failure = new GrapnelException(e);
                if (failure.Wait(attempt) is not { } wait || DateTime.UtcNow + wait > end)
                    throw failure;
                await Task.Delay(wait);
            }
        }
    }

    /// <summary>An event with an id: without one a repeated publish could be stored twice.</summary>
    public static Event NewEvent(string type, string json, string? id = null) => new()
    {
        Id = id ?? Guid.NewGuid().ToString(), Type = type, Data = ByteString.CopyFromUtf8(json), DataContentType = "application/json",
    };

    public Task<PublishResponse> PublishAsync(Event e) =>
        CallAsync(deadline => publisher.PublishAsync(new PublishRequest { Parent = parent, Event = e }, deadline: deadline));

    /// <summary>Publishes up to 500 events and 4 MiB, each on its own; returns the refusals by event id.</summary>
    public async Task<Dictionary<string, string>> PublishBatchAsync(List<Event> events)
    {
        var end = DateTime.UtcNow.AddMinutes(1);
        var refused = new Dictionary<string, string>();
        for (var attempt = 0; events.Count > 0; attempt++)
        {
            var request = new BatchPublishRequest { Parent = parent, Events = { events } };
            var results = (await CallAsync(deadline => publisher.BatchPublishAsync(request, deadline: deadline))).Results;
            if (results.Count != events.Count)
                throw new InvalidOperationException("the server did not answer every event");
            var again = new List<Event>();
            var wait = TimeSpan.Zero;
            foreach (var (e, result) in events.Zip(results))
            {
                if (result.Error is not { } error)
                    continue;
                if (error.Retryable && DateTime.UtcNow < end)
                {
                    again.Add(e);
                    var asked = error.RetryDelay?.ToTimeSpan() ?? TimeSpan.Zero;
                    wait = new[] { wait, asked, Backoff(attempt) }.Max();
                }
                else
                {
                    refused[e.Id] = $"{error.Message} ({error.Reason})";
                }
            }
            events = again;
            await Task.Delay(wait);
        }
        return refused;
    }

    /// <summary>All pages; a page may be empty and not the last.</summary>
    public async IAsyncEnumerable<Delivery> DeliveriesAsync(string filter)
    {
        var request = new ListDeliveriesRequest { Parent = parent, Filter = filter, PageSize = 200 };
        do
        {
            var page = await CallAsync(deadline => reader.ListDeliveriesAsync(request, deadline: deadline));
            foreach (var delivery in page.Deliveries)
                yield return delivery;
            request.PageToken = page.NextPageToken;
        } while (request.PageToken != "");
    }

    public async Task<Delivery> WaitAsync(Delivery delivery)
    {
        var request = new GetDeliveryRequest { Name = delivery.Name };
        while (delivery.State is Delivery.Types.State.Pending or Delivery.Types.State.Scheduled or Delivery.Types.State.InFlight)
        {
            await Task.Delay(100);
            delivery = (await CallAsync(deadline => reader.GetDeliveryAsync(request, deadline: deadline))).Delivery;
        }
        return delivery;
    }
}
