package api

import (
	"reflect"

	"google.golang.org/grpc"
)

// register adds impl when it has the methods of desc. (Interim, while services are being written side by
// side: what is not complete is not served.)
func register(g *grpc.Server, desc *grpc.ServiceDesc, impl any) {
	if reflect.TypeOf(impl).Implements(reflect.TypeOf(desc.HandlerType).Elem()) {
		g.RegisterService(desc, impl)
	}
}
