package secret

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

const keySize = 32

// keyring seals and opens values under one key-encryption key. Each version has an AES key of its own,
// derived from that key and from what the value belongs to.
type keyring struct {
	// id names the key in records, without giving anything away about it.
	id          string
	key         []byte
	fingerprint []byte
}

func newKeyring(key []byte) (*keyring, error) {
	if len(key) != keySize {
		return nil, fmt.Errorf("secret: the key has %d bytes; want %d", len(key), keySize)
	}
	id, err := hkdf.Key(sha256.New, key, nil, "grapnel secret v1 key id", 8)
	if err != nil {
		return nil, fmt.Errorf("derive key id: %w", err)
	}
	fingerprint, err := hkdf.Key(sha256.New, key, nil, "grapnel secret v1 fingerprint", keySize)
	if err != nil {
		return nil, fmt.Errorf("derive fingerprint key: %w", err)
	}
	return &keyring{id: hex.EncodeToString(id), key: key, fingerprint: fingerprint}, nil
}

// boundTo is what a sealed value is bound to. Neither a secret's name nor a plugin's holds a '|' and a slot
// comes last, so that no two contexts are equal. Without a plugin it is what it was before there were any.
func boundTo(rec *storev1.SecretRecord, version uint32) []byte {
	context := fmt.Appendf(nil, "%s|%d|%d", rec.Name, version, rec.Kind)
	if rec.Plugin != "" {
		context = fmt.Appendf(context, "|%s|%s", rec.Plugin, rec.Slot)
	}
	return context
}

func (k *keyring) aead(rec *storev1.SecretRecord, version uint32) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, k.key, nil, "grapnel secret v1 seal|"+string(boundTo(rec, version)), keySize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return cipher.NewGCM(block)
}

// seal fills the fields of a version that depend on its value. Its number must be set.
func (k *keyring) seal(rec *storev1.SecretRecord, v *storev1.SecretVersionRecord, value []byte) error {
	aead, err := k.aead(rec, v.Version)
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return fmt.Errorf("make nonce: %w", err)
	}
	v.KeyId = k.id
	v.Sealed = aead.Seal(nonce, nonce, value, boundTo(rec, v.Version))
	v.Fingerprint = k.print(rec.Name, value)
	return nil
}

// open returns ErrWrongKey or ErrTampered when the value is not what was sealed here, for this place.
func (k *keyring) open(rec *storev1.SecretRecord, v *storev1.SecretVersionRecord) ([]byte, error) {
	if v.KeyId != k.id {
		return nil, fmt.Errorf("%w: sealed under key %q, this server has key %q", ErrWrongKey, v.KeyId, k.id)
	}
	aead, err := k.aead(rec, v.Version)
	if err != nil {
		return nil, err
	}
	if len(v.Sealed) < aead.NonceSize() {
		return nil, fmt.Errorf("%w: too short", ErrTampered)
	}
	nonce, sealed := v.Sealed[:aead.NonceSize()], v.Sealed[aead.NonceSize():]
	value, err := aead.Open(nil, nonce, sealed, boundTo(rec, v.Version))
	if err != nil {
		return nil, ErrTampered
	}
	return value, nil
}

// print makes a fingerprint: equal values of one namespace show as equal, and nobody without the key can
// try values against it.
func (k *keyring) print(name string, value []byte) string {
	ns, _, _ := splitName(name)
	mac := hmac.New(sha256.New, k.fingerprint)
	mac.Write([]byte(ns))
	mac.Write([]byte{0})
	mac.Write(value)
	return hex.EncodeToString(mac.Sum(nil))[:12]
}

// foreign reports whether records exist and none of their versions was sealed under this key.
func (k *keyring) foreign(secrets []*Secret) (other string, foreign bool) {
	for _, s := range secrets {
		for _, v := range s.record.Versions {
			if v.KeyId == k.id {
				return "", false
			}
			other = v.KeyId
		}
	}
	return other, other != ""
}
