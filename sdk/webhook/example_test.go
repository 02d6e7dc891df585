package webhook_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/webhook"
)

func ExampleHandler() {
	verifier, err := webhook.NewVerifier("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	if err != nil {
		fmt.Println(err)
		return
	}
	hooks := webhook.Handler(verifier, func(_ context.Context, e webhook.Event) error {
		fmt.Printf("%s %s\n", e.Type, e.Body)
		return nil
	})

	now := time.Now()
	for range 2 { // the sender repeats itself; the handler is called once
		r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/hooks", strings.NewReader(`{"total":42}`))
		r.Header.Set("webhook-id", "evt_1")
		r.Header.Set("webhook-timestamp", strconv.FormatInt(now.Unix(), 10))
		r.Header.Set("webhook-signature", sign("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "evt_1", now, `{"total":42}`))
		r.Header.Set("ce-type", "order.created")
		w := httptest.NewRecorder()
		hooks.ServeHTTP(w, r)
		fmt.Println(w.Code)
	}
	// Output:
	// order.created {"total":42}
	// 204
	// 204
}

func ExampleVerifier_Verify() {
	verifier, err := webhook.NewVerifier("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	if err != nil {
		fmt.Println(err)
		return
	}
	header := http.Header{}
	header.Set("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
	header.Set("webhook-timestamp", "1614265330")
	header.Set("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")
	err = verifier.Verify(header, []byte(`{"test": 2432232314}`))
	fmt.Println(errors.Is(err, webhook.ErrTimestamp))
	// Output: true
}
