package plugin

import (
	"context"
	"errors"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// TestSlowSignaturesTakeTurns: of signatures that take long, few go on at once and half of the time none; those that do not
// pass by all of them, and who is new passes by what is known to be slow.
func TestSlowSignaturesTakeTurns(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	synctest.Test(t, func(t *testing.T) {
		const many, long = 50, 5 * time.Millisecond
		all := newTurns()
		at, most := 0, 0
		sign := func() error { // a place for one: nobody else writes these
			at++
			most = max(most, at)
			time.Sleep(long)
			at--
			return nil
		}
		slow := make([]*instance, many)
		for i := range slow {
			slow[i] = &instance{}
			if err := all.sign(t.Context(), slow[i], 10, sign); err != nil {
				t.Fatal(err)
			}
		}
		quick := &instance{}
		_ = all.sign(t.Context(), quick, 10, func() error { return nil })
		begin, ended := time.Now(), make(chan struct{})
		for _, inst := range slow {
			go func() {
				_ = all.sign(t.Context(), inst, 10, sign)
				ended <- struct{}{}
			}()
		}
		synctest.Wait()
		for _, inst := range []*instance{quick, {}} {
			if err := all.sign(t.Context(), inst, 10, func() error { return nil }); err != nil || time.Since(begin) > 0 {
				t.Errorf("a signature that takes no time waited %v, %v", time.Since(begin), err)
			}
		}
		given, cancel := context.WithTimeout(t.Context(), long)
		defer cancel()
		if err := all.sign(given, slow[0], 10, sign); !errors.Is(err, errTurn) {
			t.Errorf("one that is not wanted any more: %v", err)
		}
		if err := all.sign(given, quick, longBody+1, sign); !errors.Is(err, errTurn) {
			t.Errorf("one over a long body: %v", err)
		}
		for range slow {
			<-ended
		}
		if took := time.Since(begin); most != 1 || took < (2*many-1)*long {
			t.Errorf("%d at once, and all in %v; want one, and %v at the least", most, took, (2*many-1)*long)
		}
	})
}

// TestSlowSignatureDoesNotHoldUpTheStream: what is quick is answered while a signature before it, in the same batch, waits.
func TestSlowSignatureDoesNotHoldUpTheStream(t *testing.T) {
	release := make(chan struct{})
	kind := Signer("held", func(struct{}, Target) (SignFunc, error) {
		return func(r *Request) error {
			if r.MessageID == "slow" {
				<-release
			}
			r.Set("x-signed", "yes")
			return nil
		}, nil
	}, Emits("x-signed"))
	server, stop, err := NewGRPCServer("test", "1", kind)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	lis := bufconn.Listen(1 << 16)
	go server.Serve(lis) //nolint:errcheck // its end is stop's
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	configured, err := pluginv1.NewPluginServiceClient(conn).Configure(t.Context(), &pluginv1.ConfigureRequest{Instances: []*pluginv1.Instance{
		{Id: "a", Ref: 1, Generation: 1, Kind: "held", ConfigJson: []byte("{}")}, {Id: "b", Ref: 2, Generation: 2, Kind: "held", ConfigJson: []byte("{}")},
	}})
	if err != nil || len(configured.GetStatuses()[0].GetDiagnostics())+len(configured.GetStatuses()[1].GetDiagnostics()) > 0 {
		t.Fatalf("%v, %v", configured, err)
	}
	stream, err := pluginv1.NewSignerServiceClient(conn).Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(items ...*pluginv1.SignItem) {
		err := stream.Send(&pluginv1.SignRequest{Contents: []*pluginv1.Content{{MessageId: "quick"}, {MessageId: "slow"}}, Items: items})
		if err != nil {
			t.Fatal(err)
		}
	}
	answer := func() uint64 {
		resp, err := stream.Recv()
		if err != nil || len(resp.GetResults()) != 1 || len(resp.GetResults()[0].GetHeaders()) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
		return resp.GetResults()[0].GetSeq()
	}
	ask(&pluginv1.SignItem{Seq: 1, InstanceRef: 2}) // from now on it is known to be quick
	if got := answer(); got != 1 {
		t.Fatalf("%d was answered first", got)
	}
	ask(&pluginv1.SignItem{Seq: 2, InstanceRef: 1, Content: 1}, &pluginv1.SignItem{Seq: 3, InstanceRef: 2})
	if got := answer(); got != 3 {
		t.Errorf("%d was answered first", got)
	}
	close(release)
	if got := answer(); got != 2 {
		t.Errorf("%d was answered last", got)
	}
}
