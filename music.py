"""Synthetic songs: `song` composes one, and plays it.

First a `Score` is drawn (tempo, key, chords, sections), then it is played by four players, one per source, who all
read that score: so the sources fit together. Every pitched instrument, the voice included, is the one generator
`tone` with harmonics of its own; every drum is a `strike`.

In all of it, `rng` is a numpy Generator, `sample_rate` in Hz.
"""

from __future__ import annotations  # unions, on Python 3.9

from typing import NamedTuple

import numpy as np

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = {  # the root of each bar, as a degree of the scale; 0 is the tonic
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 1, 4), (0, 2, 3, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 6, 2), (0, 6, 5, 6), (0, 3, 5, 4), (0, 2, 5, 4)),
}
# Sixteen steps to the bar: x is a hit, g a quiet one, a digit the interval above the root in degrees.
KICKS = ("x.......x.......", "x.....x.x.......", "x...x...x...x...", "x..x..x...x.....", "x......xx.x.....")
SNARES = ("....x.......x...", "....x..g.g..x...", "....x.......x..g", "........x.......")
HATS = ("x.x.x.x.x.x.x.x.", "xgxgxgxgxgxgxgxg", "..x...x...x...x.", "x...x.x.x...x.x.", "x.xgx.x.x.xgx.xg")
BASS_LINES = (
    "0.0.0.0.0.0.0.0.",
    "0.....0.4.....7.",
    "0..0..0...4.0.2.",
    "0...2...4...5...",
    "0.7.0.7.0.7.0.7.",
    "0.......4.......",
    "0......00.4...7.",
    "..0...0...0...4.",
)

DRUMS = {  # a sine falling from Hz to Hz, fall and decay in s | noise from Hz to Hz, decay in s, level | pan
    "kick": (230, 52, 0.025, 0.075, 500, 4000, 0.006, 0.30, 0.0),
    "snare": (300, 185, 0.015, 0.06, 900, 9000, 0.085, 1.10, 0.05),
    "hat": (0, 0, 1.0, 0.01, 6500, 15000, 0.030, 0.50, 0.35),
    "crash": (0, 0, 1.0, 0.01, 2500, 14000, 0.450, 0.60, -0.40),
    "high tom": (240, 150, 0.06, 0.14, 400, 3000, 0.020, 0.20, 0.30),
    "low tom": (160, 90, 0.07, 0.18, 300, 2500, 0.020, 0.20, -0.30),
}
VOWELS = {  # Hz of the formants of male speakers: Peterson and Barney (1952); they give no fourth
    "a": (730, 1090, 2440, 3400),
    "e": (530, 1840, 2480, 3500),
    "i": (270, 2290, 3010, 3700),
    "o": (570, 840, 2410, 3300),
    "u": (300, 870, 2240, 3200),
}


class Bar(NamedTuple):
    section: str  # intro, verse, chorus or break
    position: int  # of the bar in its section
    last: bool  # of its section
    chord: int  # root, as a degree of the scale


class Score(NamedTuple):
    """What the players agree on. Their time is counted in steps, 16 to the bar, from the first bar on."""

    sample_rate: int
    nb_timesteps: int
    step: float  # seconds
    swing: float  # 0 is straight, 1/3 makes triplets of eighths
    tonic: int  # MIDI pitch
    scale: tuple
    bars: list
    late: str  # the source that waits for the end of the intro

    def at(self, step: float) -> int:
        """The audio sample at which `step` falls."""
        beats, rest = divmod(step, 4)
        steps = 4 * beats + np.interp(rest, (0, 2, 4), (0, 2 + 2 * self.swing, 4))
        return round(steps * self.step * self.sample_rate)

    def pitch(self, degree: int, low: int | None = None) -> int:
        """MIDI pitch of a degree of the scale; with `low`, the one in the octave that starts there."""
        pitch = self.tonic + 12 * (degree // 7) + self.scale[degree % 7]
        return pitch if low is None else low + (pitch - low) % 12

    def silence(self) -> np.ndarray:
        return np.zeros((2, self.nb_timesteps), np.float32)


def compose(rng: np.random.Generator, duration: float, sample_rate: int) -> Score:
    """Draws tempo, swing, key, chords and sections for `duration` seconds: a `Score`."""
    step = 60 / rng.uniform(84, 144) / 4
    mode = rng.choice(list(SCALES))
    verse, chorus = rng.permutation(PROGRESSIONS[mode])[:2].tolist()
    nb_bars = int(np.ceil(duration / (16 * step)))
    # Rests last one bar, and short songs have none: where a source is silent, nothing can be scored.
    rest = int(nb_bars >= 8)
    form = [("intro", rest)] + [("verse", 4), ("chorus", 4), ("break", rest)] * (nb_bars // 8 + 1)
    bars = [
        Bar(section, i, i + 1 == length, (chorus if section == "chorus" else verse)[i % 4])
        for section, length in form
        for i in range(length)
    ]
    return Score(
        sample_rate,
        round(duration * sample_rate),
        step,
        rng.choice([0, 0, 0.12, 1 / 3]),
        int(rng.integers(42, 54)),
        SCALES[mode],
        bars[:nb_bars],
        rng.choice(["drums", "bass", ""]),
    )


def hertz(pitch: float | np.ndarray) -> float | np.ndarray:
    return 440 * 2 ** ((pitch - 69) / 12)


def seconds(nb_timesteps: int, sample_rate: int) -> np.ndarray:
    return np.arange(nb_timesteps, dtype=np.float32) / np.float32(sample_rate)


def tone(
    frequency: np.ndarray, start: np.ndarray, end: np.ndarray, blend: float | np.ndarray, sample_rate: int
) -> np.ndarray:
    """A periodic sound (nb_timesteps,) whose timbre moves from `start` to `end`.

    `frequency` (nb_timesteps,) is in Hz, `start` and `end` (nb_harmonics,) are amplitudes, `blend`
    (nb_timesteps,) runs from 0 to 1. One period of each timbre is made and then read at the pitch.
    """
    size = 2048
    phase = np.cumsum(frequency) * (size / sample_rate)
    index = phase.astype(np.int64)
    fraction = (phase - index).astype(np.float32)
    index &= size - 1

    def read(harmonics):
        harmonics = harmonics[: int(0.45 * sample_rate / np.max(frequency))]  # no aliases
        spectrum = np.zeros(size // 2 + 1, complex)
        spectrum[1 : len(harmonics) + 1] = -0.5j * size * harmonics
        period = np.fft.irfft(spectrum, size).astype(np.float32)
        return period[index] + fraction * (np.roll(period, -1) - period)[index]

    before = read(start)
    return before + (read(end) - before) * blend


def envelope(t: np.ndarray, attack: float, decay: float, release: float) -> np.ndarray:
    """Amplitude (nb_timesteps,) at the times `t`: a rise, an exponential decay, a fall to zero; in seconds."""
    return np.exp(-t / decay) * np.minimum(1, t / attack) * np.minimum(1, t[::-1] / release)


def timbre(rng: np.random.Generator, slope: float, even: float, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of 30 amplitudes, struck and dying away: they fall with `slope`, then with `damping` too.

    `even` weighs the even harmonics; others are missing as on a string plucked at a random place.
    """
    k = np.arange(1, 31)
    struck = k**-slope * (0.3 + np.abs(np.sin(np.pi * k * rng.uniform(0.08, 0.45)))) * np.where(k % 2, 1, even)
    struck /= np.sqrt(np.sum(struck**2))
    return struck, struck * np.exp(-damping * (k - 1))


def note(
    pitch: float, nb_timesteps: int, harmonics: tuple, attack: float, decay: float, sample_rate: int
) -> np.ndarray:
    """A note (nb_timesteps,) of steady pitch, on a `timbre` that darkens as it decays."""
    t = seconds(nb_timesteps, sample_rate)
    sound = tone(np.full(nb_timesteps, hertz(pitch)), *harmonics, 1 - np.exp(-3 * t / decay), sample_rate)
    return sound * envelope(t, attack, decay, 0.04)


def noise(rng: np.random.Generator, nb_timesteps: int, low: float, high: float, sample_rate: int) -> np.ndarray:
    """Noise (nb_timesteps,) between two frequencies in Hz, with soft edges and unit RMS."""
    size = 1 << nb_timesteps.bit_length()  # of other lengths, an FFT can take very long
    f = np.fft.rfftfreq(size, 1 / sample_rate) + 1e-9
    spectrum = np.fft.rfft(rng.standard_normal(size)) / np.sqrt((1 + (low / f) ** 6) * (1 + (f / high) ** 6))
    sound = np.fft.irfft(spectrum, size)[:nb_timesteps].astype(np.float32)
    return sound / np.sqrt(np.mean(sound**2))


def strike(
    rng: np.random.Generator,
    start: float,
    end: float,
    fall: float,
    ring: float,
    low: float,
    high: float,
    decay: float,
    level: float,
    sample_rate: int,
) -> np.ndarray:
    """One drum hit (nb_timesteps,): a falling sine and filtered noise; the numbers are those of `DRUMS`."""
    t = seconds(int(5 * max(ring, decay) * sample_rate), sample_rate)
    sweep = np.cumsum(end + (start - end) * np.exp(-t / fall)) / sample_rate
    fizz = level * noise(rng, len(t), low, high, sample_rate) * np.exp(-t / decay)
    return np.sin(2 * np.pi * sweep) * envelope(t, 0.001, ring, 0.01) + fizz


def place(track: np.ndarray, sound: np.ndarray, start: int, pan: float = 0.0, gain: float = 1.0) -> None:
    """Adds a sound (nb_timesteps,) to a track (2, nb_timesteps) at the sample `start`, cut at the track's end.

    `pan` goes from -1, left, to 1, right, at constant power.
    """
    start = max(0, start)
    sound = sound[: max(0, track.shape[1] - start)]
    angle = (pan + 1) * np.pi / 4
    for channel, weight in zip(track, (np.cos(angle), np.sin(angle))):
        channel[start : start + len(sound)] += np.float32(gain * weight) * sound


def room(rng: np.random.Generator, track: np.ndarray, length: float, amount: float, sample_rate: int) -> np.ndarray:
    """A copy of the track (2, nb_timesteps) with ten echoes per channel, spread over `length` seconds."""
    wet = track.copy()
    for channel in wet:
        for delay in rng.uniform(0.012, length, 10):
            lag = int(delay * sample_rate)
            gain = amount * np.exp(-2 * delay / length) * rng.choice((-1, 1))
            channel[lag:] += np.float32(gain) * track[rng.integers(2), :-lag]  # from either side
    return wet


def play_drums(rng: np.random.Generator, score: Score) -> np.ndarray:
    """Kick, snare and hats, with fills and a crash where sections change: (2, nb_timesteps)."""
    kit = {}
    for name, (*numbers, level, pan) in DRUMS.items():
        tuned = np.array(numbers) * np.exp(rng.uniform(-0.2, 0.2, len(numbers)))
        kit[name] = [strike(rng, *tuned, level, score.sample_rate) for _ in range(2)], pan
    track = score.silence()

    def hit(name, step, loudness):
        sounds, pan = kit[name]
        start = score.at(step) + int(rng.normal(0, 0.003) * score.sample_rate)
        place(track, sounds[rng.integers(2)], start, pan, loudness * rng.uniform(0.85, 1.1))

    verse, chorus = (
        {"kick": rng.choice(KICKS), "snare": rng.choice(SNARES), "hat": rng.choice(HATS)} for _ in range(2)
    )
    patterns = {"intro": verse, "verse": verse, "chorus": chorus, "break": {**verse, "snare": "." * 16}}
    for number, bar in enumerate(score.bars):
        fill = 16 - int(rng.choice((4, 6, 8))) if bar.last else 16  # the step at which it starts
        for name, pattern in patterns[bar.section].items():
            for step, mark in enumerate(pattern[:fill]):
                extra = name == "kick" and step % 2 and rng.random() < 0.04
                if (mark != "." or extra) and not (score.late == "drums" and bar.section == "intro"):
                    loudness = 0.35 if mark == "g" else 0.75 if extra or step % 4 else 1.0
                    hit(name, 16 * number + step, loudness)
        for step in range(fill, 16):
            if rng.random() < 0.8:
                drum = ("snare", "high tom", "low tom")[3 * (step - fill) // (16 - fill)]
                hit(drum, 16 * number + step, 0.4 + step / 32)
        if bar.position == 0 and bar.section in ("verse", "chorus"):
            hit("crash", 16 * number, 0.8)
    return room(rng, track, 0.15, 0.05, score.sample_rate)


def play_bass(rng: np.random.Generator, score: Score) -> np.ndarray:
    """A line on the roots of the chords, its fundamentals from 40 to some 200 Hz: (2, nb_timesteps)."""
    low = int(rng.integers(28, 33))
    harmonics = timbre(rng, rng.uniform(1.0, 1.8), rng.uniform(0.4, 1), rng.uniform(0.3, 0.9))
    decay, legato = rng.choice([0.5, 1.0, 3.0]), rng.uniform(0.6, 1.0)
    verse, chorus = rng.choice(BASS_LINES, 2)
    lines = {"intro": verse, "verse": verse, "chorus": chorus, "break": "0.......4......."}
    track = score.silence()
    for number, bar in enumerate(score.bars):
        if score.late == "bass" and bar.section == "intro":
            continue
        line = lines[bar.section][:12] + "2.4." if bar.last else lines[bar.section]  # leads on
        steps = [step for step, mark in enumerate(line) if mark != "."]
        for step, following in zip(steps, steps[1:] + [16]):
            interval = score.pitch(bar.chord + int(line[step])) - score.pitch(bar.chord)
            start = score.at(16 * number + step)
            length = score.at(16 * number + step + (following - step) * legato) - start
            sound = note(score.pitch(bar.chord, low) + interval, length, harmonics, 0.006, decay, score.sample_rate)
            place(track, sound, start, gain=rng.uniform(0.8, 1.05))
    return track


def play_other(rng: np.random.Generator, score: Score) -> np.ndarray:
    """Two layers, sustained chords and a plucked figure: (2, nb_timesteps)."""
    rate, track = score.sample_rate, score.silence()
    low, width = int(rng.integers(50, 57)), rng.uniform(0.3, 0.9)
    detune = rng.uniform(0.02, 0.08)
    pad = timbre(rng, rng.uniform(0.7, 1.6), rng.choice([0.1, 0.6, 1.0]), rng.uniform(0, 0.2))
    attack = rng.choice([0.01, 0.06, 0.25])  # organ, strings, pad
    intervals = (0, 2, 4, 6) if rng.random() < 0.3 else (0, 2, 4)
    chords = [sorted(score.pitch(bar.chord + interval, low) for interval in intervals) for bar in score.bars]
    for number, (bar, chord) in enumerate(zip(score.bars, chords)):
        start = score.at(16 * number)
        length = score.at(16 * number + 16) - start + int(0.1 * rate)
        for pitch, gain in [(score.pitch(bar.chord, low) - 12, 0.1)] + [(pitch, 0.25) for pitch in chord]:
            for side in (-1, 1):
                place(track, note(pitch + side * detune, length, pad, attack, 10, rate), start, side * width, gain)
    wobble, speed = rng.uniform(0, 0.25), rng.uniform(0.5, 6)
    track *= 1 + np.float32(wobble) * np.sin(2 * np.pi * speed * seconds(score.nb_timesteps, rate))

    harmonics = timbre(rng, rng.uniform(0.6, 1.3), rng.choice([0.2, 1.0]), 0.3)
    decay, pan, level = rng.uniform(0.15, 0.5), rng.uniform(-0.8, 0.8), rng.uniform(0.6, 1.4)
    figures = {section: rng.choice(HATS) for section in ("intro", "verse", "chorus", "break")}
    strums = rng.random() < 0.4
    plucks = {}  # by pitch, since a song has few pitches and many notes
    for number, (bar, chord) in enumerate(zip(score.bars, chords)):
        ladder = chord + [pitch + 12 for pitch in chord] + chord[:0:-1]
        steps = [step for step, mark in enumerate(figures[bar.section]) if mark != "."]
        for count, step in enumerate(steps):
            for pitch in chord if strums else [ladder[count % len(ladder)] + 12]:
                if pitch not in plucks:
                    plucks[pitch] = note(pitch, int(4 * decay * rate), harmonics, 0.003, decay, rate)
                place(track, plucks[pitch], score.at(16 * number + step), pan, level * rng.uniform(0.6, 1))
    return room(rng, track, rng.uniform(0.2, 0.5), 0.2, rate)


def sung(pitch: float, vowel: str, size: float) -> np.ndarray:
    """Amplitudes (60,) of the harmonics of a voice: a glottal source that falls, times the vowel's formants."""
    k = np.arange(1, 61)
    formants = zip(VOWELS[vowel], (1, 0.6, 0.35, 0.2), (70, 90, 120, 180))  # Hz, gain, width in Hz
    amplitudes = k**-0.8 * sum(
        gain / np.sqrt(1 + ((k * hertz(pitch) / size - centre) / width) ** 2) for centre, gain, width in formants
    )
    return amplitudes / np.sqrt(np.sum(amplitudes**2))


def phrase(rng: np.random.Generator) -> list[tuple[int, int]]:
    """The rhythm of two bars of singing: (step, number of steps) of each note, with time left to breathe."""
    step, notes = int(rng.choice([0, 0, 2, 4])), []
    while step < 27:
        length = int(rng.choice([2, 2, 3, 4, 4, 6, 8]))
        notes.append((step, min(length, 29 - step)))
        step += length + 2 * int(rng.random() < 0.12)
    return notes


def play_vocals(rng: np.random.Generator, score: Score) -> np.ndarray:
    """A melody in phrases of two bars on changing vowels, with a second voice in the chorus: (2, nb_timesteps)."""
    rate, track = score.sample_rate, score.silence()
    low, size = (45, 1.0) if rng.random() < 0.5 else (55, 1.17)  # high voices have short throats
    vibrato, depth = rng.uniform(4.8, 6.5), rng.uniform(0.2, 0.6)
    breath = rng.uniform(0.02, 0.06) * noise(rng, int(2 * rate), 2500 * size, 7000, rate)
    rhythms = {section: (phrase(rng), phrase(rng)) for section in ("verse", "chorus")}
    compass = [degree for degree in range(-14, 21) if low <= score.pitch(degree) <= low + 15]
    degree = compass[len(compass) // 2]
    previous = score.pitch(degree)

    def sing(start, end, pitch, gain, pan):
        t = seconds(end - start, rate)
        glide = (previous - pitch) * np.exp(-t / 0.03) + 0.15 * rng.normal() * np.exp(-t / 0.2)
        quaver = depth * np.sin(2 * np.pi * vibrato * t + rng.uniform(0, 6)) * np.clip(3 * t - 0.5, 0, 1)
        vowels = [sung(pitch, vowel, size) for vowel in rng.choice(list(VOWELS), 2)]
        sound = tone(hertz(pitch + glide + quaver), *vowels, np.clip(4 * t - 0.3, 0, 1), rate) * (1 + 0.1 * quaver)
        consonant = 1 + 8 * np.exp(-(((t - 0.02) / 0.02) ** 2))
        place(track, (sound + np.resize(breath, len(t)) * consonant) * envelope(t, 0.03, 4, 0.06), start, pan, gain)

    for number, bar in enumerate(score.bars):
        if bar.section not in rhythms or bar.position % 2:
            continue
        rhythm = rhythms[bar.section][bar.position // 2]
        inhale = int(0.3 * rate)
        if number:
            place(track, breath[:inhale] * np.linspace(0, 1, inhale), score.at(16 * number + rhythm[0][0]) - inhale)
        for step, length in rhythm:
            chord = score.bars[min(number + step // 16, len(score.bars) - 1)].chord
            degree += int(rng.choice([-2, -1, -1, 0, 1, 1, 2]))
            # strong beats take a tone of the chord
            allowed = [d for d in compass if step % 8 or (d - chord) % 7 in (0, 2, 4)]
            degree = min(allowed, key=lambda d: abs(d - degree))
            start, end = score.at(16 * number + step), score.at(16 * number + step + 0.97 * length)
            sing(start, end, score.pitch(degree), rng.uniform(0.75, 1), 0.1)
            previous = score.pitch(degree)
            if bar.section == "chorus":
                sing(start, end, score.pitch(degree + 2), 0.4, -0.6)
    return room(rng, track, rng.uniform(0.15, 0.4), 0.12, rate)


PLAYERS = {"vocals": play_vocals, "drums": play_drums, "bass": play_bass, "other": play_other}


def song(rng: np.random.Generator, duration: float, sample_rate: int) -> dict[str, np.ndarray]:
    """A song's sources: dict of name -> (2, nb_timesteps) float32; each of them, and their sum, within ±0.95.

    `duration` is in seconds.
    """
    score = compose(rng, duration, sample_rate)
    fade = np.minimum(1, seconds(score.nb_timesteps, sample_rate)[::-1] / min(1, duration / 10))
    sources = {}
    for name, play in PLAYERS.items():
        source = play(rng, score)
        source /= np.sqrt(np.mean(source**2))
        # The soft limit is a mixing desk's: without it, single drum hits set the level of the whole song.
        sources[name] = np.tanh(source / 4) * fade * np.float32(10 ** (rng.uniform(-2.5, 1) / 20))
    peak = max(np.max(np.abs(sound)) for sound in (sum(sources.values()), *sources.values()))
    return {name: source * np.float32(0.95 / peak) for name, source in sources.items()}
