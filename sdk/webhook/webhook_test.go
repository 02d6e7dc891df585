package webhook_test

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/webhook"
)

// The vectors of the specification.
const (
	vectorSecret  = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	vectorPublic  = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
	vectorID      = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	vectorTime    = 1614265330
	vectorBody    = `{"test": 2432232314}`
	vectorHMAC    = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	vectorEd25519 = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
	otherSecret   = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
)

func atVectorTime() time.Time { return time.Unix(vectorTime, 0) }

func vectorHeader(signatures ...string) http.Header {
	h := http.Header{}
	h.Set(webhook.HeaderID, vectorID)
	h.Set(webhook.HeaderTimestamp, strconv.Itoa(vectorTime))
	for _, s := range signatures {
		h.Add(webhook.HeaderSignature, s)
	}
	return h
}

func newVerifier(t testing.TB, keys ...string) *webhook.Verifier {
	t.Helper()
	v, err := webhook.NewVerifier(keys...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// sign is the specification's formula, written out again.
func sign(secret, id string, at time.Time, body string) string {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		panic(err)
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + strconv.FormatInt(at.Unix(), 10) + "." + body))
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

func TestVerify(t *testing.T) {
	flipped := strings.Replace(vectorHMAC, "g0hM", "h0hM", 1)
	tests := []struct {
		name       string
		keys       []string
		signatures []string
		want       error
	}{
		{"v1", []string{vectorSecret}, []string{vectorHMAC}, nil},
		{"v1a", []string{vectorPublic}, []string{vectorEd25519}, nil},
		{"second key", []string{otherSecret, vectorSecret}, []string{vectorHMAC}, nil},
		{"second signature", []string{vectorSecret}, []string{flipped + " " + vectorHMAC}, nil},
		{"second line", []string{vectorSecret}, []string{flipped, vectorHMAC}, nil},
		{"both versions", []string{vectorPublic}, []string{vectorHMAC + " " + vectorEd25519}, nil},
		{"unknown version first", []string{vectorSecret}, []string{"v9,AAAA v1 " + vectorHMAC}, nil},
		{"unpadded", []string{strings.TrimRight(vectorPublic, "=")}, []string{strings.TrimRight(vectorEd25519, "=")}, nil},
		{"other key", []string{otherSecret}, []string{vectorHMAC}, webhook.ErrNoMatch},
		{"flipped bit", []string{vectorSecret}, []string{flipped}, webhook.ErrNoMatch},
		{"truncated", []string{vectorSecret}, []string{vectorHMAC[:20]}, webhook.ErrNoMatch},
		{"empty signature value", []string{vectorSecret}, []string{"v1,"}, webhook.ErrNoMatch},
		{"wrong version", []string{vectorSecret}, []string{"v1a" + strings.TrimPrefix(vectorHMAC, "v1")}, webhook.ErrNoMatch},
		{"hmac for public key", []string{vectorPublic}, []string{vectorHMAC}, webhook.ErrNoMatch},
		{"good one behind too many", []string{vectorSecret}, []string{strings.Repeat("v1,AA ", 16) + vectorHMAC}, webhook.ErrNoMatch},
		{"no signature", []string{vectorSecret}, nil, webhook.ErrMissingHeader},
		{"empty signature", []string{vectorSecret}, []string{""}, webhook.ErrMissingHeader},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newVerifier(t, tt.keys...).With(webhook.Clock(atVectorTime))
			if err := v.Verify(vectorHeader(tt.signatures...), []byte(vectorBody)); !errors.Is(err, tt.want) {
				t.Errorf("Verify = %v, want %v", err, tt.want)
			}
		})
	}
}

func TestVerifyCoversIDTimestampAndBody(t *testing.T) {
	v := newVerifier(t, vectorSecret, vectorPublic).With(webhook.Clock(atVectorTime))
	change := map[string]func(http.Header) string{
		"id":        func(h http.Header) string { h.Set(webhook.HeaderID, vectorID+"x"); return vectorBody },
		"timestamp": func(h http.Header) string { h.Set(webhook.HeaderTimestamp, "1614265331"); return vectorBody },
		"body":      func(http.Header) string { return vectorBody + " " },
		"no body":   func(http.Header) string { return "" },
	}
	for name, apply := range change {
		h := vectorHeader(vectorHMAC, vectorEd25519)
		if err := v.Verify(h, []byte(apply(h))); !errors.Is(err, webhook.ErrNoMatch) {
			t.Errorf("changed %s: %v, want ErrNoMatch", name, err)
		}
	}
}

func TestVerifyTimestamp(t *testing.T) {
	tests := []struct {
		name, timestamp string
		age             time.Duration
		want            error
	}{
		{"now", "1614265330", 0, nil},
		{"at the tolerance", "1614265330", 5 * time.Minute, nil},
		{"at the tolerance, ahead", "1614265330", -5 * time.Minute, nil},
		{"too old", "1614265330", 5*time.Minute + time.Second, webhook.ErrTimestamp},
		{"too new", "1614265330", -5*time.Minute - time.Second, webhook.ErrTimestamp},
		{"milliseconds", "1614265330000", 0, webhook.ErrTimestamp},
		{"sign", "+1614265330", 0, webhook.ErrTimestamp},
		{"negative", "-1", 0, webhook.ErrTimestamp},
		{"fraction", "1614265330.0", 0, webhook.ErrTimestamp},
		{"hex", "0x60380000", 0, webhook.ErrTimestamp},
		{"words", "today", 0, webhook.ErrTimestamp},
		{"huge", strings.Repeat("9", 400), 0, webhook.ErrTimestamp},
		{"missing", "", 0, webhook.ErrMissingHeader},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newVerifier(t, vectorSecret).With(webhook.Clock(func() time.Time { return atVectorTime().Add(tt.age) }))
			h := vectorHeader(vectorHMAC)
			h.Set(webhook.HeaderTimestamp, tt.timestamp)
			if err := v.Verify(h, []byte(vectorBody)); !errors.Is(err, tt.want) {
				t.Errorf("Verify = %v, want %v", err, tt.want)
			}
		})
	}
	strict := newVerifier(t, vectorSecret).With(webhook.Tolerance(time.Minute), webhook.Clock(func() time.Time { return atVectorTime().Add(2 * time.Minute) }))
	if err := strict.Verify(vectorHeader(vectorHMAC), []byte(vectorBody)); !errors.Is(err, webhook.ErrTimestamp) {
		t.Errorf("2 minutes old with a tolerance of 1 minute: %v, want ErrTimestamp", err)
	}
}

func TestVerifyRefusesAbsentAndLongIDs(t *testing.T) {
	v := newVerifier(t, vectorSecret).With(webhook.Clock(atVectorTime))
	for _, id := range []string{"", strings.Repeat("x", 257), "a.b", "a b", "a\x00", "é"} {
		h := vectorHeader(vectorHMAC)
		h.Set(webhook.HeaderID, id)
		if err := v.Verify(h, nil); !errors.Is(err, webhook.ErrMissingHeader) {
			t.Errorf("id of %d bytes: %v, want ErrMissingHeader", len(id), err)
		}
	}
}

// TestSignatureOfOneMessageIsNotAnothers: with dots in ids, the signature of a message whose body begins with
// digits and a dot would also be that of another message, with a longer id, a later time and a shorter body.
func TestSignatureOfOneMessageIsNotAnothers(t *testing.T) {
	later := atVectorTime().Add(24 * time.Hour)
	body := strconv.FormatInt(later.Unix(), 10) + `.{"pay":"mallory"}`
	signature := sign(vectorSecret, "msg_1", atVectorTime(), body)
	v := newVerifier(t, vectorSecret).With(webhook.Clock(func() time.Time { return later }))
	h := vectorHeader(signature)
	h.Set(webhook.HeaderID, "msg_1."+strconv.Itoa(vectorTime))
	h.Set(webhook.HeaderTimestamp, strconv.FormatInt(later.Unix(), 10))
	if err := v.Verify(h, []byte(`{"pay":"mallory"}`)); !errors.Is(err, webhook.ErrMissingHeader) {
		t.Errorf("Verify = %v, want ErrMissingHeader", err)
	}
}

// TestErrorsSayWhatIsWrong: an error is enough to find the fault by, and never shows a key.
func TestErrorsSayWhatIsWrong(t *testing.T) {
	tests := []struct {
		keys       []string
		signatures []string
		age        time.Duration
		want       string
	}{
		{[]string{vectorPublic}, []string{vectorHMAC}, 0, "they are of version v1, for which a secret (whsec_) is needed"},
		{[]string{vectorSecret}, []string{vectorEd25519}, 0, "they are of version v1a, for which a public key (whpk_) is needed"},
		{[]string{vectorSecret}, []string{"v2,AAAA"}, 0, "there is no well-formed one"},
		{[]string{otherSecret}, []string{vectorHMAC}, 0, "1 of version v1 and 0 of v1a against 1 secrets"},
		{[]string{vectorSecret}, []string{vectorHMAC}, 7 * time.Minute, "too old, by 7m0s where 5m0s is allowed"},
		{[]string{vectorSecret}, []string{vectorHMAC}, -7 * time.Minute, "too far in the future, by 7m0s"},
	}
	for _, tt := range tests {
		v := newVerifier(t, tt.keys...).With(webhook.Clock(func() time.Time { return atVectorTime().Add(tt.age) }))
		if err := v.Verify(vectorHeader(tt.signatures...), []byte(vectorBody)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Verify = %v, want %q", err, tt.want)
		}
	}
}

func TestNewVerifierRefusesMalformedKeysWithoutShowingThem(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString(make([]byte, 23))
	for name, key := range map[string]string{
		"empty":       "",
		"no prefix":   "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
		"private key": "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg==",
		"url base64":  "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa-_",
		"short":       "whsec_" + secret,
		"long":        "whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 65)),
		"short whpk":  "whpk_" + secret,
	} {
		_, err := webhook.NewVerifier(vectorSecret, key)
		if err == nil {
			t.Errorf("%s: taken, want an error", name)
			continue
		}
		if _, value, _ := strings.Cut(key, "_"); value != "" && strings.Contains(err.Error(), value) {
			t.Errorf("%s: error %q shows the key", name, err)
		}
	}
	if _, err := webhook.NewVerifier(); err == nil {
		t.Error("no key at all is taken")
	}
}

func FuzzVerify(f *testing.F) {
	f.Add(vectorID, "1614265330", vectorHMAC, []byte(vectorBody))
	f.Add(vectorID, "1614265330", vectorEd25519+" "+vectorHMAC, []byte(vectorBody))
	f.Add("", "-1", "v1, v1a,= ,", []byte(nil))
	v := newVerifier(f, vectorSecret, vectorPublic).With(webhook.Clock(atVectorTime))
	public, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(vectorPublic, "whpk_"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, id, timestamp, signature string, body []byte) {
		h := http.Header{webhook.HeaderID: {id}, webhook.HeaderTimestamp: {timestamp}, webhook.HeaderSignature: {signature}}
		if v.Verify(h, body) != nil {
			return
		}
		// Whatever is accepted must be signed by the plain reading of the specification.
		content := id + "." + timestamp + "." + string(body)
		want := sign(vectorSecret, id, parseUnix(t, timestamp), string(body))
		for entry := range strings.FieldsSeq(signature) {
			version, encoded, _ := strings.Cut(entry, ",")
			encoded = strings.TrimRight(encoded, "=")
			raw, err := base64.RawStdEncoding.DecodeString(encoded)
			if err != nil {
				continue
			}
			if version == "v1" && "v1,"+base64.StdEncoding.EncodeToString(raw) == want {
				return
			}
			if version == "v1a" && len(raw) == ed25519.SignatureSize && ed25519.Verify(public, []byte(content), raw) {
				return
			}
		}
		t.Errorf("accepted id %q, timestamp %q, signature %q", id, timestamp, signature)
	})
}

func parseUnix(t *testing.T, text string) time.Time {
	t.Helper()
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatalf("accepted timestamp %q: %v", text, err)
	}
	return time.Unix(seconds, 0)
}

func FuzzNewVerifier(f *testing.F) {
	f.Add(vectorSecret)
	f.Add(vectorPublic)
	f.Add("whsec_====")
	f.Fuzz(func(t *testing.T, key string) {
		if v, err := webhook.NewVerifier(key); err == nil {
			_ = v.Verify(vectorHeader(vectorHMAC, vectorEd25519), []byte(vectorBody))
		}
	})
}
