package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// member is one member of a JSON Web Key; the values need no escaping in JSON.
type member struct{ name, value string }

// publicMembers are those that RFC 7638 requires, in lexicographic order.
func publicMembers(public crypto.PublicKey) ([]member, error) {
	encode := base64.RawURLEncoding.EncodeToString
	switch public := public.(type) {
	case ed25519.PublicKey:
		return []member{{"crv", "Ed25519"}, {"kty", "OKP"}, {"x", encode(public)}}, nil
	case *ecdsa.PublicKey:
		point, ok := publicPoint(public)
		if !ok {
			return nil, errCurve
		}
		size := (len(point) - 1) / 2
		return []member{
			{"crv", public.Params().Name}, {"kty", "EC"}, {"x", encode(point[1 : 1+size])}, {"y", encode(point[1+size:])},
		}, nil
	case *rsa.PublicKey:
		e := big.NewInt(int64(public.E))
		return []member{{"e", encode(e.Bytes())}, {"kty", "RSA"}, {"n", encode(public.N.Bytes())}}, nil
	}
	return nil, errKind
}

// publicPoint is the uncompressed point of an EC key.
func publicPoint(public crypto.PublicKey) ([]byte, bool) {
	ec, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return nil, false
	}
	point, err := ec.Bytes()
	return point, err == nil
}

func thumbprint(members []member) string {
	sum := sha256.Sum256([]byte(object(members)))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func object(members []member) string {
	var b strings.Builder
	for i, m := range members {
		b.WriteByte("{,"[min(i, 1)])
		b.WriteString(`"` + m.name + `":"` + m.value + `"`)
	}
	b.WriteByte('}')
	return b.String()
}

// JWK is the public half as JSON Web Key with kid (the id), use "sig", and alg where the key determines it:
// EdDSA, ES256, ES384, or Alg; another RSA key has no alg.
func (k *Key) JWK() string {
	members := append([]member(nil), k.jwk...)
	members = append(members, member{"kid", k.id}, member{"use", "sig"})
	if alg := k.jwkAlg(); alg != "" {
		members = append(members, member{"alg", alg})
	}
	return object(members)
}

func (k *Key) jwkAlg() string {
	switch k.algorithm {
	case Ed25519:
		return "EdDSA"
	case ECDSAP256:
		return "ES256"
	case ECDSAP384:
		return "ES384"
	}
	return k.alg
}

// PrivateJWK is the key as private JSON Web Key. An RSA key can say there by its alg (RFC 7518: RS256, PS512
// and so on) which scheme it is for, which PEM has no place for; "" leaves that open. Others ignore alg.
func (k *Key) PrivateJWK(alg string) []byte {
	encode := base64.RawURLEncoding.EncodeToString
	members := append([]member(nil), k.jwk...)
	switch private := k.signer.(type) {
	case ed25519.PrivateKey:
		members = append(members, member{"d", encode(private.Seed())})
		alg = k.jwkAlg()
	case *ecdsa.PrivateKey:
		if d, err := private.Bytes(); err == nil {
			members = append(members, member{"d", encode(d)})
		}
		alg = k.jwkAlg()
	case *rsa.PrivateKey:
		for _, n := range []struct {
			name  string
			value *big.Int
		}{
			{"d", private.D}, {"p", private.Primes[0]}, {"q", private.Primes[1]},
			{"dp", private.Precomputed.Dp}, {"dq", private.Precomputed.Dq}, {"qi", private.Precomputed.Qinv},
		} {
			members = append(members, member{n.name, encode(n.value.Bytes())})
		}
	}
	if alg != "" {
		members = append(members, member{"alg", alg})
	}
	return []byte(object(append(members, member{"use", "sig"})))
}

// algsOf are the signature algorithms of RFC 7518, RFC 8037 and RFC 9864 by key.
func algsOf(algorithm string) []string {
	switch algorithm {
	case Ed25519:
		return []string{"EdDSA", "Ed25519"}
	case ECDSAP256:
		return []string{"ES256"}
	case ECDSAP384:
		return []string{"ES384"}
	}
	return []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
}

// privateJWK are the members read. Everything else in a key, such as kid and key_ops, is ignored.
type privateJWK struct {
	Kty  string            `json:"kty"`
	Crv  string            `json:"crv"`
	Use  string            `json:"use"`
	Alg  string            `json:"alg"`
	X    string            `json:"x"`
	Y    string            `json:"y"`
	D    string            `json:"d"`
	N    string            `json:"n"`
	E    string            `json:"e"`
	P    string            `json:"p"`
	Q    string            `json:"q"`
	Oth  []json.RawMessage `json:"oth"`
	Keys json.RawMessage   `json:"keys"`
}

func parseJWK(value []byte) (*Key, error) {
	var j privateJWK
	// The decoder's errors may quote what it met, so none is passed on.
	if json.Unmarshal(value, &j) != nil {
		return nil, errors.New("the JSON Web Key cannot be read: it is not a JSON object whose members are strings")
	}
	switch {
	case j.Keys != nil:
		return nil, errors.New("this is a set of JSON Web Keys; give one private key of it")
	case j.Kty == "oct":
		return nil, errors.New("the JSON Web Key has kty oct, a shared key; it must be OKP, EC or RSA")
	case j.Kty != "OKP" && j.Kty != "EC" && j.Kty != "RSA":
		return nil, errors.New("the JSON Web Key's kty must be OKP, EC or RSA")
	case j.Use != "" && j.Use != "sig":
		return nil, errors.New("the JSON Web Key's use is not sig")
	case j.D == "":
		return nil, errPublic
	}
	read := j.rsa
	switch j.Kty {
	case "OKP":
		read = j.okp
	case "EC":
		read = j.ec
	}
	k, err := read()
	if err != nil {
		return nil, err
	}
	if want := algsOf(k.algorithm); j.Alg != "" && !slices.Contains(want, j.Alg) {
		return nil, fmt.Errorf("the JSON Web Key's alg does not fit it; for a key of its kind it is %s", strings.Join(want, ", "))
	}
	k.alg = j.Alg
	return k, nil
}

func (j *privateJWK) okp() (*Key, error) {
	if j.Crv != "Ed25519" {
		return nil, errors.New("the JSON Web Key's crv must be Ed25519 for kty OKP")
	}
	seed, err := decodeMember("d", j.D, ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	x, err := decodeMember("x", j.X, ed25519.PublicKeySize)
	if err != nil {
		return nil, err
	}
	private := ed25519.NewKeyFromSeed(seed)
	if string(private[ed25519.SeedSize:]) != string(x) {
		return nil, errPair
	}
	return newKey(private)
}

func (j *privateJWK) ec() (*Key, error) {
	var curve elliptic.Curve
	switch j.Crv {
	case "P-256":
		curve = elliptic.P256()
	case "P-384":
		curve = elliptic.P384()
	default:
		return nil, errCurve
	}
	size := (curve.Params().BitSize + 7) / 8
	var parts [3][]byte
	for i, m := range []member{{"x", j.X}, {"y", j.Y}, {"d", j.D}} {
		var err error
		if parts[i], err = decodeMember(m.name, m.value, size); err != nil {
			return nil, err
		}
	}
	private, err := ecdsa.ParseRawPrivateKey(curve, parts[2])
	if err != nil {
		return nil, errors.New("the JSON Web Key's d is not a private key of its curve")
	}
	point, ok := publicPoint(private.Public())
	if !ok || string(point[1:]) != string(parts[0])+string(parts[1]) {
		return nil, errPair
	}
	return newKey(private)
}

func (j *privateJWK) rsa() (*Key, error) {
	if len(j.Oth) > 0 {
		return nil, errors.New("the RSA key has more than two primes, which many receivers cannot verify")
	}
	if j.P == "" || j.Q == "" {
		return nil, errors.New("the RSA key has no p and q; export it with its primes")
	}
	var numbers [5]*big.Int
	for i, m := range []member{{"n", j.N}, {"e", j.E}, {"d", j.D}, {"p", j.P}, {"q", j.Q}} {
		raw, err := decodeMember(m.name, m.value, 0)
		if err != nil {
			return nil, err
		}
		if len(raw) > rsaMaxBits/8+1 {
			return nil, fmt.Errorf("the RSA key's %s is longer than %d bits, the most taken", m.name, rsaMaxBits)
		}
		numbers[i] = new(big.Int).SetBytes(raw)
	}
	if !numbers[1].IsInt64() || numbers[1].Int64() > 1<<31-1 {
		return nil, errors.New("the RSA key's public exponent is too large; it is usually 65537")
	}
	private := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: numbers[0], E: int(numbers[1].Int64())},
		D:         numbers[2], Primes: []*big.Int{numbers[3], numbers[4]},
	}
	if err := checkRSA(private); err != nil {
		return nil, err
	}
	private.Precompute()
	return newKey(private)
}

// decodeMember reads base64url without padding; size 0 takes any length but none.
func decodeMember(name, value string, size int) ([]byte, error) {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(value)
	switch {
	case value == "":
		return nil, fmt.Errorf("the JSON Web Key has no %s", name)
	case err != nil:
		return nil, fmt.Errorf("the JSON Web Key's %s is not base64url without padding", name)
	case size > 0 && len(raw) != size:
		return nil, fmt.Errorf("the JSON Web Key's %s must be %d bytes; it is %d", name, size, len(raw))
	}
	return raw, nil
}
