package webhook_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	svix "github.com/svix/svix-webhooks/go"

	"github.com/grapnel/grapnel/sdk/webhook"
)

// official asks both official verifiers, which must agree.
func official(t *testing.T, secret string, header http.Header, body []byte) bool {
	t.Helper()
	ours, err := standardwebhooks.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := svix.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	one, two := ours.Verify(body, header) == nil, theirs.Verify(body, header) == nil
	if one != two {
		t.Fatalf("the official verifiers disagree about %v", header)
	}
	return one
}

// compare holds our verdict on a request against the official ones. They differ where ours is meant to be
// stricter, and in what the specification allows beside.
func compare(t *testing.T, secret, id, timestamp, signature string, body []byte) (accepted bool) {
	t.Helper()
	header := http.Header{webhook.HeaderID: {id}, webhook.HeaderTimestamp: {timestamp}, webhook.HeaderSignature: {signature}}
	err := newVerifier(t, secret).Verify(header, body)
	theirs := official(t, secret, header, body)
	_, notSeconds := strconv.ParseUint(timestamp, 10, 40)
	stricter := strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' || r == '.' }) || len(id) > 256 ||
		notSeconds != nil || strings.HasPrefix(timestamp, "0") ||
		len(strings.Fields(signature)) > 16 || strings.Count(signature, ",") > len(strings.Fields(signature))
	switch {
	case err == nil && !theirs && !spelledOtherwise(secret, id, timestamp, signature, body):
		t.Errorf("accepted, and refused by the official verifiers: id %q, timestamp %q, signature %q", id, timestamp, signature)
	case err != nil && theirs && !stricter:
		t.Errorf("refused (%v), and accepted by the official verifiers: id %q, timestamp %q, signature %q", err, id, timestamp, signature)
	}
	return err == nil
}

// spelledOtherwise reports whether the right signature is there without its padding, or behind other white
// space than a space.
func spelledOtherwise(secret, id, timestamp, signature string, body []byte) bool {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		return false
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, timestamp, body)
	want := "v1," + base64.RawStdEncoding.EncodeToString(mac.Sum(nil))
	for entry := range strings.FieldsSeq(signature) {
		if strings.TrimRight(entry, "=") == want {
			return true
		}
	}
	return false
}

// TestVerdictsAreTheOfficialOnes mutates good requests at random.
func TestVerdictsAreTheOfficialOnes(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 2))
	accepted, refused := 0, 0
	for range 20_000 {
		secret := []string{vectorSecret, otherSecret}[dice.IntN(2)]
		id, at := "msg_"+strconv.Itoa(dice.IntN(1000)), time.Now().Add(time.Duration(dice.IntN(800)-400)*time.Second)
		body := []byte(fmt.Sprintf(`{"n":%d}`, dice.IntN(1000)))
		timestamp := strconv.FormatInt(at.Unix(), 10)
		entries := []string{sign(vectorSecret, id, at, string(body))}
		for range dice.IntN(3) {
			entries = append(entries, []string{sign(otherSecret, id, at, string(body)), "v1,", "v1a," + strings.Repeat("A", 86) + "==", "v2,x", "v1"}[dice.IntN(5)])
		}
		dice.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
		signature := strings.Join(entries, " ")
		if text := []*string{&id, &timestamp, &signature}[dice.IntN(3)]; dice.IntN(2) == 0 && *text != "" {
			k := dice.IntN(len(*text))
			*text = (*text)[:k] + []string{"", "x", "0", " ", ".", ",", "=", "\t", "+"}[dice.IntN(9)] + (*text)[min(k+dice.IntN(2), len(*text)):]
		}
		if dice.IntN(8) == 0 {
			body = append(body, ' ')
		}
		if compare(t, secret, id, timestamp, signature, body) {
			accepted++
		} else {
			refused++
		}
	}
	if accepted < 2000 || refused < 2000 {
		t.Errorf("%d accepted and %d refused: too few of one to say anything", accepted, refused)
	}
}

// FuzzVerdicts has the fuzzer write the request. The time is added to now, and the signature "?" stands for the
// right one.
func FuzzVerdicts(f *testing.F) {
	f.Add("msg_1", int64(0), "", "?", []byte(`{}`))
	f.Add("msg.1", int64(100), "", "v1,x ?", []byte(`{}`))
	f.Add("", int64(-400), "+", "v1a,? ?,", []byte(nil))
	f.Fuzz(func(t *testing.T, id string, seconds int64, before, signature string, body []byte) {
		if strings.ContainsAny(id+before+signature, "\r\n\x00") {
			t.Skip("no header can hold it")
		}
		at := time.Now().Add(time.Duration(seconds%1000) * time.Second)
		signature = strings.ReplaceAll(signature, "?", sign(vectorSecret, id, at, string(body)))
		compare(t, vectorSecret, id, before+strconv.FormatInt(at.Unix(), 10), signature, body)
	})
}
