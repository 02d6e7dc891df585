package webhook

import "sync"

// maxUnsaid bounds what is remembered for a store that cannot be reached.
const maxUnsaid = 10_000

// unsaid are events whose end the store could not be told of.
type unsaid struct {
	mu sync.Mutex
	// ids says of each whether it was handled.
	ids map[string]bool
}

// keep remembers one; false when there is no room.
func (u *unsaid) keep(id string, done bool) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ids == nil {
		u.ids = map[string]bool{}
	}
	if _, known := u.ids[id]; !known && len(u.ids) >= maxUnsaid {
		return false
	}
	u.ids[id] = done
	return true
}

// find says whether an event is among them and was handled. One that was not handled is the caller's alone from
// here on, who keeps it again when the store still cannot be told; one that was handled stays until forget.
func (u *unsaid) find(id string) (done, found bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if done, found = u.ids[id]; found && !done {
		delete(u.ids, id)
	}
	return done, found
}

// any is find for any one of them.
func (u *unsaid) any() (id string, done, found bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, done := range u.ids {
		if !done {
			delete(u.ids, id)
		}
		return id, done, true
	}
	return "", false, false
}

func (u *unsaid) forget(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.ids, id)
}
