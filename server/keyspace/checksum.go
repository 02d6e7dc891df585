package keyspace

import (
	"encoding/binary"
	"hash/crc32"
)

// sumSize is how many bytes of a stored value are its checksum.
const sumSize = 4

// AddSum returns a value as it is stored under a key: the value, and a CRC32C over key and value, so that a
// bit that flips in either is noticed. etcd checks neither. Key is without the prefix of a Space.
func AddSum(key string, value []byte) []byte {
	stored := make([]byte, 0, len(value)+sumSize)
	return binary.BigEndian.AppendUint32(append(stored, value...), sum(key, value))
}

// CheckSum undoes AddSum. False means that the value is not what was written under this key.
func CheckSum(key string, stored []byte) (value []byte, ok bool) {
	if len(stored) < sumSize {
		return nil, false
	}
	value = stored[:len(stored)-sumSize]
	return value, binary.BigEndian.Uint32(stored[len(value):]) == sum(key, value)
}

func sum(key string, value []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	// No key holds a zero byte, so that no two pairs of key and value are summed alike.
	s := crc32.Update(0, table, append([]byte(key), 0))
	return crc32.Update(s, table, value)
}
