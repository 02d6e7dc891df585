package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// yesFlag is for commands that take something away that nobody can bring back.
func yesFlag(cmd *cobra.Command, yes *bool) {
	cmd.Flags().BoolVarP(yes, "yes", "y", false, "do it without asking")
}

// confirm asks the person at the terminal whether to go on, when loss says what would be lost. Without a terminal nobody
// can be asked, and it wants --yes.
func (c *cli) confirm(ctx context.Context, yes bool, what, loss string) error {
	if yes || loss == "" {
		return nil
	}
	what, loss = clean(what), clean(loss)
	screen, closeScreen := c.screen()
	if screen == nil {
		return usagef("deleting %s would lose %s; --yes does it", what, loss)
	}
	defer closeScreen()
	fmt.Fprintf(screen, "Deleting %s loses %s. Go on? [y/N] ", what, loss)
	answers := make(chan string, 1)
	go func() { // a read of a terminal cannot be interrupted; it ends with the process
		line, _ := bufio.NewReader(c.stdin).ReadString('\n')
		answers <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case answer := <-answers:
		if answer == "y" || answer == "yes" {
			return nil
		}
		return errors.New("nothing was deleted")
	case <-ctx.Done():
		fmt.Fprintln(screen)
		return ctx.Err()
	}
}

// screen is where a person is asked who types on standard input, wherever the output goes; nil when nobody does.
func (c *cli) screen() (io.Writer, func()) {
	if !isTerminal(c.stdin) {
		return nil, nil
	}
	if tty, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil {
		return newPrinter(tty), func() { _ = tty.Close() }
	}
	if isTerminal(c.stderr) {
		return c.stderr, func() {}
	}
	return nil, nil
}
