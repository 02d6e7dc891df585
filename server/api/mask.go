package api

import (
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// maxPaths bounds a mask: more paths than any message has fields.
const maxPaths = 128

// applyMask copies the fields that mask names from src into dst, which are of one type. An absent mask
// means every field that is set in src, on every level: what src does not mention stays, also inside a message
// of which it mentions something. Lists, maps and well-known types are one value, replaced as a whole.
// "*" means all fields, so that what src leaves empty is cleared. outputOnly names top-level fields that are never copied and, named in the mask, ignored. Paths go
// through messages, not into maps, lists or oneof-like well-known types. src is not changed, but dst may
// share parts of it afterwards.
//
// An unknown path is an INVALID_FIELD of update_mask that lists the fields there are.
func applyMask(dst, src proto.Message, mask *fieldmaskpb.FieldMask, outputOnly ...string) error {
	d, s := dst.ProtoReflect(), src.ProtoReflect()
	paths := mask.GetPaths()
	switch {
	case len(paths) == 0:
		mergeSet(d, s, outputOnly)
		return nil
	case len(paths) > maxPaths:
		return invalid(Violation{"update_mask", "has " + strconv.Itoa(len(paths)) + " paths; want at most " + strconv.Itoa(maxPaths), "field_mask"})
	case slices.Contains(paths, "*"):
		if len(paths) > 1 {
			return invalid(Violation{"update_mask", `"*" means all fields and stands alone`, "field_mask"})
		}
		for i := range d.Descriptor().Fields().Len() {
			f := d.Descriptor().Fields().Get(i)
			if !slices.Contains(outputOnly, string(f.Name())) {
				copyField(d, s, f)
			}
		}
		return nil
	}
	var faults []Violation
	for _, path := range paths {
		if fault := checkPath(d.Descriptor(), path, outputOnly); fault != "" {
			faults = append(faults, Violation{"update_mask", fault, "field_mask"})
		}
	}
	if len(faults) > 0 {
		return invalid(faults...)
	}
	for _, path := range paths {
		names := strings.Split(path, ".")
		if !slices.Contains(outputOnly, names[0]) {
			copyPath(d, s, names)
		}
	}
	return nil
}

// mergeSet copies what is set in s, and goes into messages.
func mergeSet(d, s protoreflect.Message, outputOnly []string) {
	s.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case slices.Contains(outputOnly, string(f.Name())):
		case isOneValue(f):
			d.Set(f, v)
		default:
			mergeSet(d.Mutable(f).Message(), v.Message(), nil)
		}
		return true
	})
}

// isOneValue reports whether a field can only be replaced as a whole.
func isOneValue(f protoreflect.FieldDescriptor) bool {
	return f.IsMap() || f.IsList() || f.Message() == nil || strings.HasPrefix(string(f.Message().FullName()), "google.protobuf.")
}

// mentions reports whether an update with src and mask is about the field at path: with an absent mask, whether
// src sets it.
func mentions(src proto.Message, mask *fieldmaskpb.FieldMask, path string) bool {
	if len(mask.GetPaths()) > 0 {
		return slices.ContainsFunc(mask.GetPaths(), func(p string) bool {
			return p == "*" || p == path || strings.HasPrefix(path, p+".")
		})
	}
	m := src.ProtoReflect()
	for name := range strings.SplitSeq(path, ".") {
		f := m.Descriptor().Fields().ByName(protoreflect.Name(name))
		if f == nil || !m.Has(f) {
			return false
		}
		if !isOneValue(f) {
			m = m.Get(f).Message()
		}
	}
	return true
}

// checkPath says in words what is wrong with a path, or "".
func checkPath(m protoreflect.MessageDescriptor, path string, outputOnly []string) string {
	names := strings.Split(path, ".")
	for i, name := range names {
		f := m.Fields().ByName(protoreflect.Name(name))
		if f == nil {
			hide := outputOnly
			if i > 0 {
				hide = nil
			}
			return "path " + quote(path) + " names no field; the fields are " + fieldNames(m, hide)
		}
		if i == len(names)-1 {
			return ""
		}
		if isOneValue(f) {
			return "path " + quote(path) + " goes inside " + quote(strings.Join(names[:i+1], ".")) + ", which can only be replaced as a whole"
		}
		m = f.Message()
	}
	return ""
}

func fieldNames(m protoreflect.MessageDescriptor, hide []string) string {
	var names []string
	for i := range m.Fields().Len() {
		if name := string(m.Fields().Get(i).Name()); !slices.Contains(hide, name) {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

func copyPath(d, s protoreflect.Message, names []string) {
	f := d.Descriptor().Fields().ByName(protoreflect.Name(names[0]))
	if len(names) == 1 {
		copyField(d, s, f)
		return
	}
	if !s.Has(f) && !d.Has(f) {
		return
	}
	copyPath(d.Mutable(f).Message(), s.Get(f).Message(), names[1:])
}

func copyField(d, s protoreflect.Message, f protoreflect.FieldDescriptor) {
	if s.Has(f) {
		d.Set(f, s.Get(f))
	} else {
		d.Clear(f)
	}
}
