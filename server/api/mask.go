package api

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// applyMask copies the fields that mask names from src into dst, which are of one type. An absent mask
// means every field that is set in src; "*" means all fields, so that what src leaves empty is cleared.
// outputOnly names top-level fields that are never copied and, named in the mask, ignored. Paths go
// through messages, not into maps, lists or oneof-like well-known types. src is not changed, but dst may
// share parts of it afterwards.
//
// An unknown path is an INVALID_FIELD of update_mask that lists the fields there are.
func applyMask(dst, src proto.Message, mask *fieldmaskpb.FieldMask, outputOnly ...string) error {
	d, s := dst.ProtoReflect(), src.ProtoReflect()
	paths := mask.GetPaths()
	switch {
	case len(paths) == 0:
		s.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			if !slices.Contains(outputOnly, string(f.Name())) {
				d.Set(f, v)
			}
			return true
		})
		return nil
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
		if f.IsMap() || f.IsList() || f.Message() == nil || strings.HasPrefix(string(f.Message().FullName()), "google.protobuf.") {
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
