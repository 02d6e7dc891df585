//go:build !race

package server

// raceDetector says whether this is a build for it.
const raceDetector = false
