package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// rawBound posts n signed bodies to the sink with a bare net/http client: what the machine could do if
// Grapnel cost nothing. The headers are those Grapnel sends, so that the sink does the same work.
func (b *bench) rawBound(ctx context.Context, n int) (throughput, error) {
	if err := b.sink.reset(); err != nil {
		return throughput{}, err
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(benchKey, "whsec_"))
	if err != nil {
		return throughput{}, err
	}
	client := &http.Client{Transport: &http.Transport{
		MaxIdleConns: b.concurrency, MaxIdleConnsPerHost: b.concurrency, DisableCompression: true,
	}}
	defer client.CloseIdleConnections()
	body := payload(b.payload, 1, time.Time{})
	var next, failed atomic.Int64
	m := beginMeasure(map[string]int{"sink": b.sink.cmd.Process.Pid, "self": selfPid()})
	var wg sync.WaitGroup
	for range b.concurrency {
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > int64(n) || ctx.Err() != nil {
					return
				}
				if err := rawPost(client, b.sink.url("/s/raw"), key, i, body); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	wall, cpu := m.end()
	if f := failed.Load(); f > 0 {
		return throughput{}, fmt.Errorf("raw loop: %d of %d requests failed", f, n)
	}
	if _, err := b.sink.await(ctx, int64(n)); err != nil {
		return throughput{}, fmt.Errorf("raw loop: %w", err)
	}
	return throughput{
		Name: "raw net/http", Deliveries: n, Seconds: wall.Seconds(), PerSecond: float64(n) / wall.Seconds(), Ratio: 1,
		ClientCPU: perDelivery(cpu["self"], n), SinkCPU: perDelivery(cpu["sink"], n),
	}, nil
}

func rawPost(client *http.Client, url string, key []byte, i int64, body []byte) error {
	id := "evt_" + strconv.FormatInt(1e17+i, 10)
	ts := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, key)
	_, _ = fmt.Fprintf(mac, "%s.%s.", id, ts)
	mac.Write(body)
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = http.Header{
		"Content-Type":      {"application/json"},
		"Webhook-Id":        {id},
		"Webhook-Timestamp": {ts},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))},
		"Ce-Specversion":    {"1.0"}, "Ce-Id": {id}, "Ce-Type": {"bench.event"}, "Ce-Source": {"//grapnel/bench"},
		"Ce-Time":     {"2026-01-01T00:00:00Z"},
		"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		"User-Agent":  {"grapnel-bench"},
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}
