package sigv4_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/sigv4"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// Credentials of the AWS Signature Version 4 test suite.
const (
	suiteID     = "AKIDEXAMPLE"
	suiteSecret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
	suiteToken  = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA=="
)

func suiteTime() time.Time {
	return time.Date(2015, 8, 30, 12, 36, 0, 999, time.FixedZone("", 3600)).Add(time.Hour)
}

// instance is one configured as the suite has it, with changes.
func instance(method, url string, changes map[string]any, values ...string) plugintest.Instance {
	config := map[string]any{"region": "us-east-1", "service": "service", "access_key_id": suiteID}
	for name, value := range changes {
		config[name] = value
	}
	if len(values) == 0 {
		values = []string{suiteSecret}
	}
	return plugintest.Instance{
		Kind: "sigv4", Config: config, Secrets: map[string][]string{"key": values},
		Target: plugin.Target{Method: method, URL: url},
	}
}

func request(body string, headers ...string) plugin.Request {
	r := plugin.Request{MessageID: "evt0123", Created: suiteTime(), Body: []byte(body)}
	for i := 0; i < len(headers); i += 2 {
		r.Headers = append(r.Headers, plugin.Header{Name: headers[i], Value: headers[i+1]})
	}
	return r
}

func sign(t testing.TB, in plugintest.Instance, r plugin.Request) plugin.Request {
	t.Helper()
	signed, err := plugintest.New(t, sigv4.Kind()).Configure(in).Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// TestSuite has the cases of the AWS test suite but for those whose requests cannot be sent: a raw space or
// character outside ASCII in the path (get-space, get-utf8), a folded header (get-header-value-multiline).
func TestSuite(t *testing.T) {
	for _, tt := range []struct {
		name, method, target string
		headers              []string
		body                 string
		names, signature     string
	}{
		{"get-header-key-duplicate", "GET", "/", []string{"My-Header1", "value2", "My-Header1", "value2", "My-Header1", "value1"}, "", "host;my-header1;x-amz-date", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"},
		{"get-header-value-order", "GET", "/", []string{"My-Header1", "value4", "My-Header1", "value1", "My-Header1", "value3", "My-Header1", "value2"}, "", "host;my-header1;x-amz-date", "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"},
		{"get-header-value-trim", "GET", "/", []string{"My-Header1", " value1", "My-Header2", " \"a   b   c\""}, "", "host;my-header1;my-header2;x-amz-date", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"},
		{"get-unreserved", "GET", "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", nil, "", "host;x-amz-date", "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"},
		{"get-vanilla-empty-query-key", "GET", "/?Param1=value1", nil, "", "host;x-amz-date", "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"},
		{"get-vanilla-query-order-key-case", "GET", "/?Param2=value2&Param1=value1", nil, "", "host;x-amz-date", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"},
		{"get-vanilla-query-order-key", "GET", "/?Param1=value2&Param1=Value1", nil, "", "host;x-amz-date", "eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1"},
		{"get-vanilla-query-order-value", "GET", "/?Param1=value2&Param1=value1", nil, "", "host;x-amz-date", "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694"},
		{"get-vanilla-query-unreserved", "GET", "/?-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz=-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", nil, "", "host;x-amz-date", "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"},
		{"get-vanilla-query", "GET", "/", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-vanilla-utf8-query", "GET", "/?ሴ=bar", nil, "", "host;x-amz-date", "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"},
		{"get-vanilla", "GET", "/", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-relative-relative", "GET", "/example1/example2/../..", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-relative", "GET", "/example/..", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-slash-dot-slash", "GET", "/./", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-slash-pointless-dot", "GET", "/./example", nil, "", "host;x-amz-date", "ef75d96142cf21edca26f06005da7988e4f8dc83a165a80865db7089db637ec5"},
		{"get-slash", "GET", "//", nil, "", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-slashes", "GET", "//example//", nil, "", "host;x-amz-date", "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84"},
		{"post-header-key-case", "POST", "/", nil, "", "host;x-amz-date", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		{"post-header-key-sort", "POST", "/", []string{"My-Header1", "value1"}, "", "host;my-header1;x-amz-date", "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"},
		{"post-header-value-case", "POST", "/", []string{"My-Header1", "VALUE1"}, "", "host;my-header1;x-amz-date", "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d"},
		{"post-sts-header-after", "POST", "/", nil, "", "host;x-amz-date", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		{"post-vanilla-empty-query-value", "POST", "/?Param1=value1", nil, "", "host;x-amz-date", "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"},
		{"post-vanilla-query", "POST", "/?Param1=value1", nil, "", "host;x-amz-date", "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"},
		{"post-vanilla", "POST", "/", nil, "", "host;x-amz-date", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		{"post-x-www-form-urlencoded-parameters", "POST", "/", []string{"Content-Type", "application/x-www-form-urlencoded; charset=utf8", "Content-Length", "13"}, "Param1=value1", "content-type;host;x-amz-date", "1a72ec8f64bd914b0e42e42607c7fbce7fb2c7465f63e3092b3b0d39fa77a6fe"},
		{"post-x-www-form-urlencoded", "POST", "/", []string{"Content-Type", "application/x-www-form-urlencoded", "Content-Length", "13"}, "Param1=value1", "content-type;host;x-amz-date", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			signed := []string{}
			for name := range strings.SplitSeq(tt.names, ";") {
				if name != "host" && name != "x-amz-date" {
					signed = append(signed, name)
				}
			}
			in := instance(tt.method, "https://example.amazonaws.com"+tt.target, map[string]any{"signed_headers": signed})
			got := sign(t, in, request(tt.body, tt.headers...))
			want := "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=" + tt.names + ", Signature=" + tt.signature
			if got.Get("authorization") != want {
				t.Errorf("authorization\n%s, want\n%s", got.Get("authorization"), want)
			}
			if got.Get("x-amz-date") != "20150830T123600Z" || got.Get("x-amz-content-sha256") != "" {
				t.Errorf("x-amz-date %q, x-amz-content-sha256 %q", got.Get("x-amz-date"), got.Get("x-amz-content-sha256"))
			}
		})
	}
}

func TestSuiteSessionToken(t *testing.T) {
	in := instance("POST", "https://example.amazonaws.com/", nil)
	in.Secrets["session_token"] = []string{suiteToken}
	got := sign(t, in, request(""))
	want := "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date;x-amz-security-token, " +
		"Signature=85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead"
	if got.Get("authorization") != want || got.Get("x-amz-security-token") != suiteToken {
		t.Errorf("post-sts-header-before: authorization\n%s, want\n%s", got.Get("authorization"), want)
	}
}

// TestS3 has the examples of "Signature Calculations for the Authorization Header" in the S3 API reference.
func TestS3(t *testing.T) {
	for _, tt := range []struct {
		name, method, target string
		headers              []string
		body                 string
		names, signature     string
	}{
		{"GET object", "GET", "/test.txt", []string{"range", "bytes=0-9"}, "", "host;range;x-amz-content-sha256;x-amz-date",
			"f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"},
		{"PUT object", "PUT", "/test$file.text", []string{"date", "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class", "REDUCED_REDUNDANCY"}, "Welcome to Amazon S3.",
			"date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"},
		{"PUT object, encoded on the way", "PUT", "/test%24file.text", []string{"date", "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class", "REDUCED_REDUNDANCY"}, "Welcome to Amazon S3.",
			"date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"},
		{"GET bucket lifecycle", "GET", "/?lifecycle", nil, "", "host;x-amz-content-sha256;x-amz-date",
			"fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"},
		{"GET bucket", "GET", "/?max-keys=2&prefix=J", nil, "", "host;x-amz-content-sha256;x-amz-date",
			"34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := instance(tt.method, "https://examplebucket.s3.amazonaws.com"+tt.target,
				map[string]any{"service": "s3", "access_key_id": "AKIAIOSFODNN7EXAMPLE", "signed_headers": []string{"range", "date"}},
				"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
			r := request(tt.body, tt.headers...)
			r.Created = time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC)
			got := sign(t, in, r)
			want := "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders=" + tt.names + ", Signature=" + tt.signature
			if got.Get("authorization") != want {
				t.Errorf("authorization\n%s, want\n%s", got.Get("authorization"), want)
			}
		})
	}
}

// signatureOf computes a signature from a canonical request that a test writes out.
func signatureOf(canonical, service string) string {
	mac := func(key []byte, text string) []byte {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	key := []byte("AWS4" + suiteSecret)
	for _, part := range []string{"20150830", "us-east-1", service, "aws4_request"} {
		key = mac(key, part)
	}
	sum := sha256.Sum256([]byte(canonical))
	return hex.EncodeToString(mac(key, "AWS4-HMAC-SHA256\n20150830T123600Z\n20150830/us-east-1/"+service+"/aws4_request\n"+hex.EncodeToString(sum[:])))
}

func hexSum(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

func TestCanonicalRequest(t *testing.T) {
	for _, tt := range []struct {
		name, target string
		config       map[string]any
		path, query  string
		content      string // x-amz-content-sha256; empty when not sent
	}{
		{"encoded twice", "/a%20b/c%2Fd/~x", nil, "/a%2520b/c%252Fd/~x", "", ""},
		{"encoded once for S3", "/a%20b/c%2Fd//./~x", map[string]any{"service": "s3"}, "/a%20b/c/d//./~x", "", "body"},
		{"no path", "", nil, "/", "", ""},
		{"dots at the end", "/a/b/..", nil, "/a/", "", ""},
		{"above the root", "/../../a", nil, "/a", "", ""},
		{"query", "/?b=2&a=x+y%20z&a=&%C3%A9&&b=1%2F", nil, "/", "%C3%A9=&a=&a=x%20y%20z&b=1%2F&b=2", ""},
		{"empty query", "/?", nil, "/", "", ""},
		{"content on", "/", map[string]any{"content_sha256": "on"}, "/", "", "body"},
		{"content off for S3", "/", map[string]any{"service": "s3", "content_sha256": "off"}, "/", "", ""},
		{"unsigned", "/", map[string]any{"unsigned_payload": true}, "/", "", "UNSIGNED-PAYLOAD"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, body := range []string{"", "{}", "\x00\xff\r\n", strings.Repeat("x", 1<<20)} {
				got := sign(t, instance("PATCH", "http://example.com:8443"+tt.target, tt.config),
					request(body, "content-type", " application/json;  charset=utf-8 ", "webhook-id", "evt0123", "traceparent", "00-x"))
				payload, names := hexSum(body), "content-type;host;webhook-id;x-amz-date"
				lines := "content-type:application/json; charset=utf-8\nhost:example.com:8443\nwebhook-id:evt0123\n"
				if tt.content != "" {
					if tt.content != "body" {
						payload = tt.content
					}
					lines, names = lines+"x-amz-content-sha256:"+payload+"\n", "content-type;host;webhook-id;x-amz-content-sha256;x-amz-date"
				}
				lines += "x-amz-date:20150830T123600Z\n"
				service := "service"
				if s, ok := tt.config["service"].(string); ok {
					service = s
				}
				canonical := "PATCH\n" + tt.path + "\n" + tt.query + "\n" + lines + "\n" + names + "\n" + payload
				if want := "SignedHeaders=" + names + ", Signature=" + signatureOf(canonical, service); !strings.HasSuffix(got.Get("authorization"), want) {
					t.Errorf("body of %d bytes: authorization %s, want …%s", len(body), got.Get("authorization"), want)
				}
				if content := got.Get("x-amz-content-sha256"); (tt.content != "") != (content == payload) {
					t.Errorf("x-amz-content-sha256 %q", content)
				}
			}
		})
	}
}

func TestWhichLiveKeySigns(t *testing.T) {
	const other = "AKIDNEWER:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
	for which, want := range map[string]string{"newest": "Credential=AKIDNEWER/", "oldest": "Credential=AKIDEXAMPLE/"} {
		got := sign(t, instance("POST", "https://example.com/", map[string]any{"sign_with": which}, other, suiteSecret), request(""))
		if !strings.Contains(got.Get("authorization"), want) {
			t.Errorf("sign_with %s: %s, want %s", which, got.Get("authorization"), want)
		}
	}
	alone := sign(t, instance("POST", "https://example.amazonaws.com/", map[string]any{"access_key_id": ""}, suiteID+":"+suiteSecret), request(""))
	if !strings.HasSuffix(alone.Get("authorization"), "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b") {
		t.Errorf("ID:SECRET signs differently: %s", alone.Get("authorization"))
	}
}

func TestPureAcrossDaysAndGoroutines(t *testing.T) {
	inst := plugintest.New(t, sigv4.Kind()).Configure(instance("POST", "https://example.amazonaws.com/", nil))
	want := map[int]string{}
	at := func(day int) plugin.Request {
		r := request("body")
		r.Created = r.Created.AddDate(0, 0, day)
		return r
	}
	for day := range 3 {
		signed, err := inst.Sign(at(day))
		if err != nil {
			t.Fatal(err)
		}
		want[day] = signed.Get("authorization")
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 60 {
				day := (i + g) % 3
				signed, err := inst.Sign(at(day))
				if err != nil {
					t.Error(err)
					return
				}
				if diff := cmp.Diff(want[day], signed.Get("authorization")); diff != "" {
					t.Errorf("day %d (-first +again):\n%s", day, diff)
				}
			}
		})
	}
	wg.Wait()
}

func TestSignErrors(t *testing.T) {
	h := plugintest.New(t, sigv4.Kind())
	inst := h.Configure(instance("POST", "https://example.com/", nil))
	for _, name := range []string{"Authorization", "x-amz-date", "X-Amz-Content-Sha256", "x-amz-security-token"} {
		if _, err := inst.Sign(request("", name, "x")); err == nil || !strings.Contains(err.Error(), strings.ToLower(name)) {
			t.Errorf("request that has %s: %v", name, err)
		}
	}
}

func TestBadConfigsAreRefused(t *testing.T) {
	h := plugintest.New(t, sigv4.Kind())
	const url = "https://example.com/"
	tests := []struct {
		name    string
		url     string
		config  map[string]any
		secrets []string
		pointer string
		hint    string
	}{
		{"region", url, map[string]any{"region": ""}, nil, "/config/region", "us-east-1"},
		{"service", url, map[string]any{"service": "a/b"}, nil, "/config/service", "without space"},
		{"access key id", url, map[string]any{"access_key_id": "AK ID"}, nil, "/config/access_key_id", "without space"},
		{"no access key id", url, map[string]any{"access_key_id": ""}, []string{"AKIDX:" + suiteSecret, suiteSecret}, "/config/access_key_id", "version 2 of 2"},
		{"unsigned and not announced", url, map[string]any{"unsigned_payload": true, "content_sha256": "off"}, nil, "/config/unsigned_payload", "content_sha256"},
		{"signed header", url, map[string]any{"signed_headers": []string{"date", "User-Agent"}}, nil, "/config/signed_headers/1", "changed"},
		{"signature signed", url, map[string]any{"signed_headers": []string{"authorization"}}, nil, "/config/signed_headers/0", "header of the request"},
		{"no header name", url, map[string]any{"signed_headers": []string{"a b"}}, nil, "/config/signed_headers/0", "no header name"},
		{"default port", "https://example.com:443/", nil, nil, "/target/uri", ":443"},
		{"capitals", "https://Example.com/", nil, nil, "/target/uri", "lower case"},
		{"broken query", url + "?a=%zz", nil, nil, "/target/uri", "percent-encoded"},
		{"no secret", url, nil, []string{"hunter2hunter2"}, "/secrets/key", "40 characters"},
		{"line break", url, nil, []string{suiteSecret + "\n"}, "/secrets/key", "line break"},
		{"swapped", url, nil, []string{"AKIAIOSFODNN7EXAMPLE"}, "/secrets/key", "access key id"},
		{"token too", url, nil, []string{"AKID:" + suiteSecret + ":x"}, "/secrets/key", "more than one colon"},
		{"id missing", url, nil, []string{":" + suiteSecret}, "/secrets/key", "before the colon"},
		{"not ASCII", url, nil, []string{suiteSecret + "é"}, "/secrets/key", "ASCII"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			problems := h.Validate(instance("POST", tt.url, tt.config, tt.secrets...))
			if len(problems) != 1 || problems[0].Pointer != tt.pointer || !strings.Contains(problems[0].Summary, tt.hint) {
				t.Fatalf("problems %+v, want one at %s that says %q", problems, tt.pointer, tt.hint)
			}
			for _, secret := range append(tt.secrets, suiteSecret) {
				if strings.Contains(problems[0].Summary, secret[:8]) {
					t.Errorf("summary %q shows the key", problems[0].Summary)
				}
			}
		})
	}
	taken := instance("POST", url, nil)
	taken.Target.Headers = []plugin.Header{{Name: "Authorization", Value: "Basic eDp5"}}
	if problems := h.Validate(taken); len(problems) != 1 || !strings.Contains(problems[0].Summary, "authorization") {
		t.Errorf("problems %+v, want one about the subscription's own authorization", problems)
	}
	token := instance("POST", url, nil)
	token.Secrets["session_token"] = []string{"a b"}
	if problems := h.Validate(token); len(problems) != 1 || problems[0].Pointer != "/secrets/session_token" {
		t.Errorf("problems %+v, want one about the session token", problems)
	}
}

func TestSecretsAreReadAndNeverMade(t *testing.T) {
	h := plugintest.New(t, sigv4.Kind())
	read, problems := h.PrepareSecret("sigv4", "key", suiteID+":"+suiteSecret, "")
	if len(problems) > 0 || read.KeyID != suiteID || read.Algorithm != "AWS4-HMAC-SHA256" || !bytes.HasSuffix(read.Value, []byte(suiteSecret)) {
		t.Errorf("key id %q, algorithm %q, %v", read.KeyID, read.Algorithm, problems)
	}
	if _, problems := h.PrepareSecret("sigv4", "key", "", ""); len(problems) != 1 || !strings.Contains(problems[0].Summary, "must be given") {
		t.Errorf("problems %+v, want one that says that AWS makes the keys", problems)
	}
}
