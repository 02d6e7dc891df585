package delivery

import "testing"

func TestParseTraceparent(t *testing.T) {
	const well = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for text, want := range map[string]string{
		well: well, "01" + well[2:] + "-more": well, "01" + well[2:]: well, well[:54] + "0": well[:54] + "0",
		well + "-more": "", "ff" + well[2:]: "", well[:54]: "", "": "", "00-" + "AF" + well[5:]: "", well[:3] + "00000000000000000000000000000000" + well[35:]: "",
		well[:36] + "0000000000000000-01": "", "00_" + well[3:]: "", "01" + well[2:] + "more": "",
	} {
		got, ok := ParseTraceparent(text)
		if ok != (want != "") || ok && string(got.Append(nil)) != want {
			t.Errorf("%q is read as %v, %t", text, got, ok)
		}
	}
}
