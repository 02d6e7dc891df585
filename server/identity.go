package server

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Deliveries make sense only beside the configuration that they were accepted under. So each of the two stores knows
// the other: etcd holds the journal's ID, and a file beside the journal the ID of etcd's cluster. A store that is
// missing, or another than that, is refused until the operator says that it is meant.

// pair names the two stores that belong together.
type pair struct {
	journal string
	etcd    uint64
}

func pairFile(o Options) string   { return filepath.Join(o.DataDir, "stores") }
func journalDir(o Options) string { return filepath.Join(o.DataDir, "journal") }

// errStranger begins the refusal of a store.
var errStranger = errors.New("the stores in the data directory do not belong together")

// meant is how to go on regardless.
const meant = "if this is meant, start once with --adopt-stores: deliveries whose subscriptions are not in this etcd are then not made, " +
	"and events that are not in this journal are unknown"

// journalMade reports whether there is a journal.
func journalMade(o Options) bool {
	manifests, _ := filepath.Glob(filepath.Join(journalDir(o), "MANIFEST-*"))
	return len(manifests) > 0
}

// checkPresence refuses to make one store where the other, or the file, says that there was one already. It is
// asked before anything is made.
func checkPresence(o Options) error {
	if err := errRestoring(o); err != nil {
		return err
	}
	if o.AdoptStores {
		return nil
	}
	_, known, err := readPair(pairFile(o))
	if err != nil {
		return err
	}
	embedded := len(o.EtcdEndpoints) == 0
	switch {
	case !journalMade(o) && (known || embedded && etcdMade(o)):
		return fmt.Errorf("%w: the journal in %s is missing, and there was one: mount or restore it; %s", errStranger, journalDir(o), meant)
	case known && embedded && !etcdMade(o):
		return fmt.Errorf("%w: the embedded etcd in %s is missing, and this journal had an etcd: restore it, or give the --etcd-endpoints it had; %s",
			errStranger, etcdDir(o), meant)
	}
	return nil
}

// checkPair compares the stores that were opened with those that belong together. owner is whose etcd says that it is.
func checkPair(o Options, found pair, owner string) error {
	want, known, err := readPair(pairFile(o))
	where := "the embedded etcd in " + etcdDir(o)
	if len(o.EtcdEndpoints) > 0 {
		where = "etcd at " + strings.Join(o.EtcdEndpoints, ", ")
	}
	switch {
	case err != nil:
		return err
	case known && want.journal != found.journal:
		return fmt.Errorf("%w: expected the journal %s, %s has %s; %s", errStranger, want.journal, journalDir(o), found.journal, meant)
	case owner != "" && owner != found.journal:
		return fmt.Errorf("%w: expected the configuration of the journal %s, what %s holds belongs to the journal %s; %s",
			errStranger, found.journal, where, owner, meant)
	case !known:
		return nil
	case want.etcd != found.etcd:
		return fmt.Errorf("%w: expected the etcd cluster %x, %s is %x; %s", errStranger, want.etcd, where, found.etcd, meant)
	case owner == "":
		return fmt.Errorf("%w: %s is empty, and held the configuration of the journal %s: restore it; %s", errStranger, where, want.journal, meant)
	}
	return nil
}

// notePair remembers which stores belong together.
func notePair(o Options, p pair) error {
	if want, known, err := readPair(pairFile(o)); err == nil && known && want == p {
		return nil
	}
	if err := writeDurably(pairFile(o), p.encode()); err != nil {
		return fmt.Errorf("note which stores belong together: %w", err)
	}
	return nil
}

func (p pair) encode() []byte {
	text := fmt.Sprintf("journal %s etcd %016x", p.journal, p.etcd)
	return fmt.Appendf(nil, "%s crc32c %08x\n", text, checksum(text))
}

func checksum(text string) uint32 {
	return crc32.Checksum([]byte(text), crc32.MakeTable(crc32.Castagnoli))
}

// readPair reads the file; known is false when there is none.
func readPair(path string) (p pair, known bool, err error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return pair{}, false, nil
	}
	if err != nil {
		return pair{}, false, err
	}
	var sum uint32
	_, err = fmt.Sscanf(string(content), "journal %s etcd %x crc32c %x\n", &p.journal, &p.etcd, &sum)
	if err != nil || string(p.encode()) != string(content) {
		return pair{}, false, fmt.Errorf("%s, which says which journal and etcd belong together, is damaged: restore it, or start once with --adopt-stores if they do", path)
	}
	return p, true, nil
}
