package pluginhost

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

// TestAnswersThatAreGuessedWait: a plugin that answers what it has not been sent yet does not take it from the sender.
func TestAnswersThatAreGuessedWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sending, let := make(chan []*pending), make(chan struct{})
		l := newLink(2, func(batch []*pending) error {
			sending <- batch
			<-let
			return nil
		})
		ran := make(chan error)
		go func() { ran <- l.run() }()
		p := &pending{plan: &plan{timeout: time.Second}}
		p.Content = wire.ContentOf(&delivery.Event{}, nil)
		if l.enqueue(p) != accepted {
			t.Fatal("it was not taken")
		}
		batch := <-sending
		seq := batch[0].Seq
		taken := make(chan []*pending)
		for range 2 { // only one of them is right
			go func() {
				got, _ := l.take([]uint64{seq}, nil)
				taken <- got
			}()
		}
		synctest.Wait()
		select {
		case got := <-taken:
			t.Fatalf("%d taken while they are being sent", len(got))
		default:
		}
		close(let)
		if n := len(<-taken) + len(<-taken); n != 1 {
			t.Errorf("it was taken %d times", n)
		}
		l.stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}
