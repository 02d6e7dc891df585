package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func ExampleClient_Publish() {
	ctx := context.Background()
	c, stop := startExample()
	defer stop()

	r, err := c.Publish(ctx, "acme", client.Event{
		ID:   "o-1001-created", // makes publishing it again harmless
		Type: "order.created",
		Data: []byte(`{"order":1001}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(r.GetName(), r.GetDuplicate())
	// Output: namespaces/acme/events/o-1001-created false
}

func ExampleClient_Publisher() {
	ctx := context.Background()
	c, stop := startExample()
	defer stop()

	p := c.Publisher("acme", client.PublisherOptions{})
	var results []*client.Result
	for n := 1; n <= 3; n++ {
		results = append(results, p.Publish(ctx, client.Event{
			ID:   fmt.Sprintf("o-%d-created", n),
			Type: "order.created",
			Data: fmt.Appendf(nil, `{"order":%d}`, n),
		}))
	}
	if err := p.Close(ctx); err != nil { // sends what is left and waits for the answers
		log.Fatal(err)
	}
	for _, r := range results {
		name, err := r.Result()
		fmt.Println(name, err)
	}
	// Output:
	// namespaces/acme/events/o-1-created <nil>
	// namespaces/acme/events/o-2-created <nil>
	// namespaces/acme/events/o-3-created <nil>
}

func ExampleSubscriptions_Update() {
	ctx := context.Background()
	c, stop := startExample()
	defer stop()

	_, err := c.Subscriptions("acme").Update(ctx, "orders", func(s *grapnelv1.Subscription) error {
		s.MaxInFlight = 4
		return nil
	})
	if errors.Is(err, client.ErrNotFound) {
		fmt.Println("there is no such subscription")
	}
	// Output: there is no such subscription
}

func ExamplePublishError() {
	ctx := context.Background()
	c, stop := startExample()
	defer stop()

	_, err := c.Publish(ctx, "acme", client.Event{ID: "o-1001-created", Type: "order.created", Subject: "caf\xe9"})
	switch {
	case errors.Is(err, client.ErrMaybeStored):
		fmt.Println("publish it again with the same ID")
	case errors.Is(err, client.ErrNotStored):
		fmt.Println("it is not stored:", err)
	}
	// Output: it is not stored: event.subject: must be valid UTF-8 (INVALID_FIELD)
}
