// Package process starts one OS process and confines it: it finds and checks the program, gives the process a private
// directory, an empty environment, limits and a user, reads what it writes without ever blocking it, and sees to it
// that neither the process nor a descendant outlives its parent. It knows the handshake of go-plugin, whose runner a
// Child is, and nothing of what the process is for.
package process
