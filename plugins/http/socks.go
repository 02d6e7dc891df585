package httpplugin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Numbers of SOCKS 5 (RFC 1928) and of its user name and password (RFC 1929).
const (
	socksVersion     = 5
	socksNoAuth      = 0
	socksPassword    = 2
	socksNoMethod    = 0xff
	socksLogin       = 1
	socksConnect     = 1
	socksIPv4        = 1
	socksName        = 3
	socksIPv6        = 4
	socksSucceeded   = 0
	socksNotAllowed  = 2
	socksNetwork     = 3
	socksHost        = 4
	socksRefused     = 5
	socksTTLExpired  = 6
	socksNoSuchAddrs = 8
)

var errNotSOCKS = &proxyRefusal{code: plugin.CodeProtocol, message: "it did not answer in SOCKS 5"}

// socks5 has the proxy connect to want.
func (x *proxy) socks5(conn net.Conn, want string) error {
	if err := x.socksGreet(conn); err != nil {
		return err
	}
	request, err := socksRequest(want)
	if err != nil {
		return err
	}
	if _, err := conn.Write(request); err != nil {
		return err
	}
	var head [4]byte // version, reply, reserved, type of the address that follows
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return err
	}
	if head[0] != socksVersion {
		return errNotSOCKS
	}
	if head[1] != socksSucceeded {
		return socksRefusal(head[1])
	}
	size := 0
	switch head[3] {
	case socksIPv4:
		size = 4
	case socksIPv6:
		size = 16
	case socksName:
		var length [1]byte
		if _, err := io.ReadFull(conn, length[:]); err != nil {
			return err
		}
		size = int(length[0])
	default:
		return errNotSOCKS
	}
	// The address that the proxy connects from is of no use here, but must be out of the way.
	_, err = io.ReadFull(conn, make([]byte, size+2))
	return err
}

// socksGreet agrees on how to authenticate, and does.
func (x *proxy) socksGreet(conn net.Conn) error {
	greeting := []byte{socksVersion, 1, socksNoAuth}
	if x.login {
		greeting = []byte{socksVersion, 2, socksNoAuth, socksPassword}
	}
	if _, err := conn.Write(greeting); err != nil {
		return err
	}
	var answer [2]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	switch {
	case answer[0] != socksVersion:
		return errNotSOCKS
	case answer[1] == socksNoAuth:
		return nil
	case answer[1] == socksPassword && x.login:
	case answer[1] == socksNoMethod && !x.login:
		return &proxyRefusal{code: plugin.CodeConfig, message: "it wants credentials, and the slot proxy_credentials is empty"}
	case answer[1] == socksNoMethod:
		return &proxyRefusal{code: plugin.CodeConfig, message: "it takes no user name and password"}
	default:
		return errNotSOCKS
	}
	if len(x.user) > 255 || len(x.password) > 255 {
		return errors.New("credentials are too long for SOCKS 5")
	}
	login := append([]byte{socksLogin, byte(len(x.user))}, x.user...)
	login = append(append(login, byte(len(x.password))), x.password...)
	if _, err := conn.Write(login); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	if answer[1] != socksSucceeded {
		return &proxyRefusal{code: plugin.CodeConfig, message: "it refused the credentials"}
	}
	return nil
}

// socksRequest is CONNECT to an address, or to a name of at most 255 bytes.
func socksRequest(want string) ([]byte, error) {
	host, text, err := net.SplitHostPort(want)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil, err
	}
	request := []byte{socksVersion, socksConnect, 0}
	ip, err := netip.ParseAddr(host)
	switch ip = ip.Unmap(); {
	case err == nil && ip.Is4():
		request = append(append(request, socksIPv4), ip.AsSlice()...)
	case err == nil:
		request = append(append(request, socksIPv6), ip.AsSlice()...)
	case len(host) > 255:
		return nil, errors.New("the host name is longer than 255 bytes")
	default:
		request = append(append(request, socksName, byte(len(host))), host...)
	}
	return binary.BigEndian.AppendUint16(request, uint16(port)), nil
}

func socksRefusal(reply byte) *proxyRefusal {
	switch reply {
	case socksNotAllowed:
		return &proxyRefusal{code: plugin.CodeConnect, message: "its rules do not allow a connection to the receiver"}
	case socksNetwork, socksHost, socksTTLExpired:
		return &proxyRefusal{code: plugin.CodeConnect, message: "it could not reach the receiver", another: true}
	case socksRefused:
		return &proxyRefusal{code: plugin.CodeConnect, message: "the receiver refused its connection", another: true}
	case socksNoSuchAddrs:
		return &proxyRefusal{code: plugin.CodeConnect, message: "it does not take addresses of this kind", another: true}
	}
	return &proxyRefusal{code: plugin.CodeConnect, message: fmt.Sprintf("it refused to connect to the receiver (SOCKS 5 reply %d)", reply)}
}
