package pluginhost

import (
	"errors"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

// TestAnswersThatAreGuessedAreRefused: a plugin that answers what it cannot have been sent yet does not take it from under the
// sender.
func TestAnswersThatAreGuessedAreRefused(t *testing.T) {
	looking, sending := make(chan uint64), make(chan struct{})
	var l *link
	l = newLink(2, func(batch []*pending) error {
		looking <- batch[0].Seq
		<-sending
		batch[0].Number = 1 // the sender's own until it has read it
		l.read()
		sending <- struct{}{}
		return nil
	})
	ran := make(chan error)
	go func() { ran <- l.run() }()
	p := &pending{plan: &plan{timeout: time.Second}}
	p.Content = wire.ContentOf(&delivery.Event{}, nil)
	if l.enqueue(p) != accepted {
		t.Fatal("it was not taken")
	}
	seq := <-looking
	if got, err := l.take([]uint64{seq}, nil); len(got) != 0 || !errors.Is(err, errProtocol) {
		t.Errorf("taken while the sender looks at it: %d, %v", len(got), err)
	}
	sending <- struct{}{}
	<-sending
	if got, err := l.take([]uint64{seq}, nil); len(got) != 1 || err != nil {
		t.Errorf("taken once it is on its way: %d, %v", len(got), err)
	}
	if got, err := l.take([]uint64{seq}, nil); len(got) != 0 || !errors.Is(err, errProtocol) {
		t.Errorf("taken twice: %d, %v", len(got), err)
	}
	l.stop()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}
