package delivery

// ID names a delivery. Its text form sorts by creation time and leads to the partition.
type ID struct {
	// Seq is the event's sequence: unix milliseconds << 16 | counter, rising within a partition.
	Seq       uint64
	Partition uint16
	// Ordinal is the index into the event's targets.
	Ordinal uint16
}
