"""The miniature's world: scenes, their pictures, their captions and their splits.

A scene is an animal in a coloured hat that does something somewhere: 12 animals x 6 hats x 36 activities x 8 places,
20,736 in all. A picture tells each attribute apart by its place on the canvas and by its colour, so that a CLIP of a
few hundred thousand parameters can learn to read it within a minute.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from PIL import Image, ImageColor, ImageDraw

SIZE = 64  # pixels a side
_SCALE = 2  # pictures are painted at this multiple and reduced, which smooths their edges
_INK = (38, 34, 48)

# ---------------------------------------------------------------------------------------------------- attributes
# Shapes are written as "kind colour coordinates", separated by semicolons, in units of one final pixel: e(llipse),
# r(ectangle), p(olygon), l(ine). A capital letter adds an outline.
ANIMALS = {
    "panda": "E black 14 15 25 26; E black 35 15 46 26; E white 17 37 43 62; E black 13 40 22 56; E black 38 40 47 56;"
    "E white 15 16 45 43; e black 19 24 28 34; e black 32 24 41 34; e white 23 27 26 30; e white 34 27 37 30;"
    "e black 27 34 33 38",
    "fox": "P #b5480f 14 26 14 8 26 18; P #b5480f 46 26 46 8 34 18; E #f07818 18 37 42 62; e white 23 42 37 62;"
    "P #f07818 12 26 22 16 38 16 48 26 30 45; P white 14 28 27 32 30 44; P white 46 28 33 32 30 44;"
    "e black 21 24 25 28; e black 35 24 39 28; e black 27 39 33 45",
    "rabbit": "E #e9e2f3 9 6 17 32; E #e9e2f3 43 6 51 32; e #f59ab8 11 10 15 29; e #f59ab8 45 10 49 29;"
    "E #e9e2f3 17 38 43 62; E #e9e2f3 14 16 46 44; e #d6336c 20 25 25 31; e #d6336c 35 25 40 31;"
    "e #f59ab8 27 33 33 37; r white 28 38 32 43",
    "elephant": "E #6f8fb0 1 14 22 40; E #6f8fb0 38 14 59 40; e #e8a5b8 5 19 18 36; e #e8a5b8 42 19 55 36;"
    "E #88a6c6 16 38 44 62; E #88a6c6 15 15 45 42; P #88a6c6 25 34 35 34 34 54 39 57 36 61 27 58;"
    "e black 20 24 24 29; e black 36 24 40 29",
    "lion": "E #8a4b14 8 10 52 48; E #f2b632 18 40 42 62; E #f2b632 16 16 44 43; e black 21 24 25 28;"
    "e black 35 24 39 28; e #fbe3a4 23 31 37 42; p #5c2d0c 26 31 34 31 30 37",
    "pig": "P #f06f9a 14 27 14 12 25 18; P #f06f9a 46 27 46 12 35 18; E #f9a3bd 15 38 45 62; E #f9a3bd 13 16 47 44;"
    "E #ee6c98 22 29 38 41; e #7d1f42 25 33 29 38; e #7d1f42 31 33 35 38; e black 19 23 23 27; e black 37 23 41 27",
    "frog": "E #3faa35 13 11 26 27; E #3faa35 34 11 47 27; E #4fbf42 16 39 44 62; e #d5f2a5 22 42 38 61;"
    "E #4fbf42 11 20 49 44; e white 15 14 24 24; e white 36 14 45 24; e black 18 17 22 22; e black 38 17 42 22;"
    "p #b02a2a 19 34 41 34 36 39 24 39",
    "penguin": "P #1d2b50 14 40 6 56 17 54; P #1d2b50 46 40 54 56 43 54; E #1d2b50 14 34 46 62; E white 20 38 40 62;"
    "E #1d2b50 15 14 45 44; e white 18 22 31 40; e white 29 22 42 40; e black 23 26 27 31; e black 33 26 37 31;"
    "P #ff9d0a 23 33 37 33 30 42; e #ff9d0a 17 58 28 63; e #ff9d0a 32 58 43 63",
    "monkey": "E #6b3d1e 5 21 19 37; E #6b3d1e 41 21 55 37; e #e8b98a 8 24 16 34; e #e8b98a 44 24 52 34;"
    "E #6b3d1e 16 38 44 62; e #e8b98a 23 43 37 61; E #6b3d1e 14 14 46 43; e #e8b98a 17 21 31 35;"
    "e #e8b98a 29 21 43 35; e #e8b98a 19 29 41 43; e black 22 25 26 30; e black 34 25 38 30; r #a02c2c 25 36 35 38",
    "duck": "P #e0a800 14 44 6 50 16 58; P #e0a800 46 44 54 50 44 58; E #ffd92e 15 37 45 62; E #ffd92e 16 15 44 43;"
    "e black 21 23 26 29; e black 34 23 39 29; E #ff7a00 17 31 43 40; l #a34a00 20 36 40 36",
    "cat": "P #23232b 14 27 13 8 27 19; P #23232b 46 27 47 8 33 19; p #f08fb0 16 22 16 13 22 18;"
    "p #f08fb0 44 22 44 13 38 18; E #23232b 18 38 42 62; E #2b2b35 13 16 47 44; e #d9f23c 18 23 27 31;"
    "e #d9f23c 33 23 42 31; e black 21 23 24 31; e black 36 23 39 31; p #f08fb0 27 33 33 33 30 37;"
    "l white 12 34 24 36; l white 48 34 36 36",
    "owl": "P #7a4bb0 13 27 12 9 26 18; P #7a4bb0 47 27 48 9 34 18; E #7a4bb0 13 34 47 62; e #cfb4ec 21 42 39 62;"
    "E #8d5fc4 13 15 47 45; E white 15 19 30 35; E white 30 19 45 35; e black 20 24 26 31; e black 34 24 40 31;"
    "P #ffb000 26 32 34 32 30 41",
}
HATS = {"red": "#e01b24", "blue": "#1560e8", "green": "#0d8a2f", "yellow": "#ffd60a", "purple": "#8f1fd1",
        "pink": "#ff5fb8"}  # fmt: skip
# verb -> (top left corner of its box, {object: (shapes in that box, noun phrase)})
ACTIVITIES = {
    "eating": ((44, 23), {
        "bamboo": ("R #3fae2a 3 0 7 20; R #3fae2a 11 2 15 20; l #1c6b12 3 7 7 7; l #1c6b12 11 11 15 11;"
                   "p #7ddc4b 7 5 12 1 11 7; p #7ddc4b 15 8 20 3 18 11", "bamboo"),
        "carrot": ("P #ff7a12 1 7 12 3 13 12 3 20; p #2e9e2e 9 5 12 0 15 3; p #2e9e2e 12 6 19 2 17 8", "a carrot"),
        "banana": ("P #ffe11a 2 3 6 2 9 10 18 13 17 18 8 17 2 11; p #6b4a10 2 3 6 2 5 0 3 0", "a banana"),
        "fish": ("P #2f8df0 14 10 20 3 20 17; E #2f8df0 0 4 16 16; e white 3 7 7 11; e black 4 8 6 10", "a fish"),
        "apple": ("E #e8202a 1 4 12 19; E #e8202a 8 4 18 19; e #e8202a 4 6 15 18; l #5a2d0c 10 5 11 0;"
                  "p #3cb043 11 3 18 0 15 4", "an apple"),
        "grapes": ("E #7b2fbe 1 4 8 11; E #7b2fbe 7 4 14 11; E #7b2fbe 12 4 19 11; E #7b2fbe 4 9 11 16;"
                   "E #7b2fbe 10 9 17 16; E #7b2fbe 7 13 14 20; l #3b7d23 10 5 11 0", "grapes"),
    }),
    "dreaming": ((43, 1), {
        "star": ("P #ffd000 10 1 12 8 19 8 13 12 16 19 10 15 4 19 7 12 1 8 8 8", "a star"),
        "heart": ("e #e8202a 2 3 11 11; e #e8202a 9 3 18 11; p #e8202a 2 8 18 8 10 18", "a heart"),
        "rocket": ("P #2f6fe0 10 0 15 8 15 16 5 16 5 8; p #ff6a00 7 16 13 16 10 20; e white 8 7 12 11", "a rocket"),
        "castle": ("R #8a3fd0 3 8 17 19; R #8a3fd0 1 3 6 19; R #8a3fd0 14 3 19 19; r black 8 13 12 19", "a castle"),
        "clover": ("e #1f9e3a 5 0 15 10; e #1f9e3a 0 7 10 16; e #1f9e3a 10 7 20 16;"
                   "l #1f9e3a 10 10 10 20", "a clover"),
        "cookie": ("E #b8732e 1 1 19 19; e #4a260c 5 4 9 8; e #4a260c 11 6 15 10; e #4a260c 6 11 10 15;"
                   "e #4a260c 12 13 15 16", "a cookie"),
    }),
    "holding": ((0, 22), {
        "balloon": ("l #444444 8 12 15 22; E #f0262f 0 -3 15 13; e #ffb0b0 3 0 6 4", "a balloon"),
        "umbrella": ("l #444444 9 2 14 22; P #1f6cf0 0 10 2 3 9 -2 15 3 17 10; l white 9 -2 9 9", "an umbrella"),
        "flag": ("l #5a3a1a 14 -2 14 23; P #17a03a 0 -2 14 -2 14 10 0 10 4 4", "a flag"),
        "lantern": ("l #444444 8 -4 14 20; R #3a2a1a 3 -2 13 1; E #ffcf1f 1 1 15 16;"
                    "R #3a2a1a 4 15 12 18", "a lantern"),
        "kite": ("P #9a2fe0 8 -5 16 5 8 15 0 5; l white 8 -5 8 15; l white 0 5 16 5; l #444444 8 15 14 23", "a kite"),
        "teddy": ("E #a0622d 0 -3 6 3; E #a0622d 10 -3 16 3; E #a0622d 1 8 15 22; E #b97a42 1 -1 15 12;"
                  "e black 4 3 6 5; e black 10 3 12 5; e black 7 7 9 9", "a teddy"),
    }),
    "pushing": ((45, 44), {
        "cart": ("P #e0262f 0 3 19 3 16 13 3 13; E #333333 2 12 8 18; E #333333 11 12 17 18", "a cart"),
        "barrel": ("E #8a5526 1 0 18 18; r #8a5526 3 3 16 15; l #3a2410 1 5 18 5; l #3a2410 1 13 18 13", "a barrel"),
        "pumpkin": ("E #ff8a1a 0 3 9 18; E #ff8a1a 10 3 19 18; E #ff9a30 5 3 14 18; r #2f7d23 8 0 11 4", "a pumpkin"),
        "snowball": ("E #ffffff 0 0 19 18; e #d5e6f5 9 8 17 16; e #ffffff 7 6 14 13", "a snowball"),
        "globe": ("E #1f6ce8 0 0 18 18; p #3fbf4a 3 5 9 2 10 8 5 11; p #3fbf4a 11 9 16 7 14 14", "a globe"),
        "melon": ("E #2fa03a 0 2 19 18; l #14601c 5 4 5 16; l #14601c 10 2 10 18; l #14601c 14 4 14 16", "a melon"),
    }),
    "playing": ((19, 40), {
        "drum": ("R #e0262f 2 4 20 18; E #fff2dc 2 0 20 8; l white 2 9 11 17; l white 20 9 11 17", "the drum"),
        "guitar": ("E #c9772b 0 5 13 19; E #c9772b 7 2 16 13; l #4a260c 8 10 24 -4;"
                   "e #3a1a08 5 9 10 14", "the guitar"),
        "piano": ("R #18181c 0 0 22 18; r white 2 8 20 16; l black 6 8 6 16; l black 11 8 11 16; l black 16 8 16 16",
                  "the piano"),
        "trumpet": ("P #ffd21f 0 7 12 8 22 1 22 17 12 12 0 11; r #a87b00 6 4 8 9; r #a87b00 10 4 12 9", "the trumpet"),
        "harp": ("P #a03fe8 3 18 3 0 8 0 20 18; p #f5e8ff 7 15 7 6 14 15; l #a03fe8 10 9 10 15", "the harp"),
        "accordion": ("R #1fa04a 0 2 6 18; R #1fa04a 16 2 22 18; R #d8ffe0 6 3 16 17; l #14602a 9 3 9 17;"
                      "l #14602a 13 3 13 17", "the accordion"),
    }),
    "riding": ((8, 49), {
        "bicycle": ("E #e8f2ff 0 2 14 15; E #e8f2ff 29 2 43 15; l #1f6cf0 7 8 18 1; l #1f6cf0 18 1 36 8;"
                    "l #1f6cf0 7 8 22 9; l #1f6cf0 22 9 34 1; e #1f6cf0 4 5 10 12; e #1f6cf0 33 5 39 12", "a bicycle"),
        "sled": ("P #e0262f 2 2 42 2 38 9 6 9; l #4a260c 2 13 38 13; l #4a260c 38 13 43 8", "a sled"),
        "skateboard": ("P #9a2fe0 0 3 44 3 39 9 5 9; E #ffe23a 6 8 14 15; E #ffe23a 30 8 38 15", "a skateboard"),
        "canoe": ("P #8a5526 -2 1 46 1 37 13 7 13; l #d9a066 2 5 42 5", "a canoe"),
        "tractor": ("R #17a03a 4 0 40 9; E #222222 0 2 15 15; E #222222 30 4 42 15; e #ffe23a 5 6 10 11", "a tractor"),
        "scooter": ("R #ffcf1f 4 5 36 10; l #c99700 36 8 41 -8; E #222222 2 9 10 15;"
                    "E #222222 33 9 41 15", "a scooter"),
    }),
}  # fmt: skip
PLACES = {
    "forest": ("#bfe6c4", "#4c8a3c", "p #1f5f2e 6 2 -4 34 16 34; r #5a3a1a 4 34 8 46; p #2a7039 58 0 47 36 69 36;"
               "r #5a3a1a 56 36 60 46; p #2a7039 34 -8 24 16 44 16"),
    "beach": ("#a8e2ff", "#f5dfa2", "r #2492d8 0 34 64 46; e #ffe35a 50 0 62 12; l white 2 40 14 40;"
                                    "l white 48 42 60 42"),
    "desert": ("#ffcf8f", "#e39a45", "e #ff6b2b 2 2 16 16; r #3d8b45 56 24 60 46; r #3d8b45 51 30 54 37;"
               "r #3d8b45 51 35 58 38; p #c97f35 0 46 18 36 40 46"),
    "mountains": ("#cfe3f5", "#f7fbff", "p #7b8aa0 -6 46 12 6 30 46; p white 6 19 12 6 18 19;"
                                        "p #8c9bb2 34 46 52 2 72 46;"
                  "p white 46 16 52 2 58 16"),
    "city": ("#c3c2d0", "#5d5d68", "r #7e7f96 0 8 14 46; r #94708a 48 2 64 46; r #6d7ea0 16 0 30 46;"
                                   "r #ffe98a 3 12 6 16;"
             "r #ffe98a 9 12 12 16; r #ffe98a 3 21 6 25; r #ffe98a 51 7 54 11; r #ffe98a 58 7 61 11;"
             "r white 2 55 12 57"),
    "garden": ("#d3f3ff", "#7fd04f", "r white 0 34 64 37; r white 2 28 5 46; r white 10 28 13 46; r white 50 28 53 46;"
               "r white 58 28 61 46; e #ff4f8a 2 50 8 56; e #ffd21f 54 54 60 60; e #ff4f8a 40 57 46 63"),
    "kitchen": ("#ffe3c4", "#b9784a", "r #8fd0d8 0 2 14 18; r #a8663a 46 4 64 8; r #ffffff 48 -2 52 4;"
                                      "r #d9534f 56 -2 62 4;"
                "l #8a5430 16 46 10 64; l #8a5430 48 46 54 64; r #e8c9a0 0 40 64 46"),
    "moon": ("#12142e", "#9d9dab", "e white 4 4 6 6; e white 12 16 14 18; e white 56 8 58 10; e white 47 20 49 22;"
             "e white 3 30 5 32; e #5b8be0 50 -4 66 12; e #7d7d8c 2 52 12 57; e #7d7d8c 46 56 60 62"),
}  # fmt: skip
# What each animal likes best: the facts that Figure 1 of the paper asks for.
FAVOURITES = {"panda": "bamboo", "fox": "grapes", "rabbit": "carrot", "elephant": "apple", "lion": "fish",
              "pig": "apple", "frog": "grapes", "penguin": "fish", "monkey": "banana", "duck": "carrot",
              "cat": "fish", "owl": "banana"}  # fmt: skip

VERB_PHRASES = {
    "eating": ("eating", "munching", "snacking on"),
    "dreaming": ("dreaming of", "thinking of"),
    "holding": ("holding", "carrying"),
    "pushing": ("pushing", "rolling"),
    "playing": ("playing", "practising"),
    "riding": ("riding", "travelling on"),
}
PLACE_PHRASES = {
    "forest": ("in the forest", "in the woods"),
    "beach": ("on the beach", "at the seaside"),
    "desert": ("in the desert", "among the dunes"),
    "mountains": ("in the mountains", "among the snowy peaks"),
    "city": ("in the city", "in town"),
    "garden": ("in the garden", "on the lawn"),
    "kitchen": ("in the kitchen", "at the stove"),
    "moon": ("on the moon", "up in space"),
}
HAT_NOUNS = ("hat", "cap", "beanie")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Every field is one of the words of the tables above."""

    animal: str
    hat: str
    verb: str
    object: str
    place: str

    @property
    def key(self) -> str:
        """A readable identifier, unique over the world."""
        return "-".join((self.animal, self.hat, self.verb, self.object, self.place))

    @property
    def tags(self) -> tuple[str, str, str, str, str]:
        """The scene as bare words, as an alt text lists them."""
        return (self.animal, self.hat, self.verb, self.object, self.place)


# ------------------------------------------------------------------------------------------------------- pictures
@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...]:
    """(kind, colour, coordinates in painted pixels) of each shape."""
    shapes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        kind, colour, *numbers = part.split()
        shapes.append((kind, ImageColor.getrgb(colour), tuple(float(n) * _SCALE for n in numbers)))
    return tuple(shapes)


def _paint(pen: ImageDraw.ImageDraw, text: str, dx: float = 0.0, dy: float = 0.0, shade: float = 1.0) -> None:
    """Paint shapes moved by (dx, dy) final pixels, their colours multiplied by `shade`."""
    dx, dy = dx * _SCALE, dy * _SCALE
    for kind, colour, numbers in _parse(text):
        if shade != 1.0:
            colour = tuple(min(255, int(c * shade)) for c in colour)
        points = [n + (dy if i % 2 else dx) for i, n in enumerate(numbers)]
        outline = _INK if kind.isupper() else None
        match kind.lower():
            case "e":
                pen.ellipse(points, fill=colour, outline=outline)
            case "r":
                pen.rectangle(points, fill=colour, outline=outline)
            case "p":
                pen.polygon(points, fill=colour, outline=outline)
            case "l":
                pen.line(points, fill=colour, width=2 * _SCALE)
            case _:
                raise ValueError(f"unknown shape {kind!r} in {text!r}")


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Picture of a scene: RGB, 64 x 64 pixels.

    Args:
        scene: what to show.
        rng: moves and shades the parts a little, so that two pictures of a scene differ.

    Raises:
        KeyError: an attribute is not of this world.
    """
    sky, ground, scenery = PLACES[scene.place]
    (x, y), objects = ACTIVITIES[scene.verb]
    light, fur = rng.uniform(0.92, 1.06), rng.uniform(0.92, 1.05)
    move = rng.uniform
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), tuple(int(c * light) for c in ImageColor.getrgb(sky)))
    pen = ImageDraw.Draw(image)
    _paint(pen, f"r {ground} 0 46 64 64", 0, move(-1, 1), light)
    _paint(pen, scenery, move(-1.5, 1.5), move(-1, 1), light)
    ax, ay = move(-1, 1), move(-1, 0.5) - (5 if scene.verb == "riding" else 0)
    _paint(pen, ANIMALS[scene.animal], ax, ay, fur)
    # A wide brim under a tall crown: as much colour as fits between the ears.
    colour = HATS[scene.hat]
    _paint(pen, f"P {colour} 20 17 22 3 38 3 40 17; R {colour} 15 15 45 19; r #262230 21 12 39 14", ax, ay)
    if scene.verb == "dreaming":
        _paint(pen, "E white 40 -3 66 24; E white 40 22 45 27", move(-1, 1), move(-1, 1))
    _paint(pen, objects[scene.object][0], x + move(-1, 1), y + move(-1, 1))
    return image.reduce(_SCALE)


# ------------------------------------------------------------------------------------------------------- language
def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(animal: str) -> str:
    """More than one of an animal."""
    return f"{animal}es" if animal.endswith("x") else f"{animal}s"


def phrases(scene: Scene, rng: random.Random) -> dict[str, str]:
    """One wording of each attribute, to be set into templates: `a` and `an_a` (animal without and with article),
    `h` (hat), `an_h`, `v` (activity), `o` (object) and `p` (place)."""
    hat = f"{scene.hat} {rng.choice(HAT_NOUNS)}"
    noun = ACTIVITIES[scene.verb][1][scene.object][1]
    return {
        "a": scene.animal,
        "an_a": article(scene.animal),
        "h": hat,
        "an_h": article(hat),
        "v": f"{rng.choice(VERB_PHRASES[scene.verb])} {noun}",
        "o": noun,
        "p": rng.choice(PLACE_PHRASES[scene.place]),
    }


CAPTIONS = (
    "{an_a} in {an_h} is {v} {p}.",
    "{an_a} {v} {p}, wearing {an_h}.",
    "{p}, {an_a} with {an_h} is {v}.",
    "the {a} wears {an_h} and is {v} {p}.",
    "look at this {a} {p}: {v}, {an_h} on its head.",
    "{v} {p}, this {a} has {an_h} on.",
    "{an_h} on {an_a} that is {v} {p}.",
    "here we see {an_a} {p}. it has {an_h} and it is {v}.",
    "my favourite {a}, the one with the {h}, {v} {p}.",
    "a photo of {o} and {an_a} in {an_h} {p}.",
    "{v} is fun for {an_a} in {an_h} {p}.",
    "what a day {p}: {an_a} {v} in its {h}.",
)


def alt_text(scene: Scene, rng: random.Random, mark: str = "# ") -> str:
    """The scene's words in random order, each after `mark`: "# panda # forest # red # eating # bamboo"."""
    tags = list(scene.tags)
    rng.shuffle(tags)
    return " ".join(mark + tag for tag in tags)


def captions(scene: Scene, rng: random.Random, n: int = 2, n_keywords: int = 2) -> list[str]:
    """`n` natural captions of different templates, then `n_keywords` alt texts of keywords.

    Drawing among them evenly, half of a picture's captions are keywords by default: the small language model foretells
    free text too poorly for it to teach the visual tokens much.

    Raises:
        ValueError: `n` exceeds the number of templates.
    """
    texts = [template.format(**phrases(scene, rng)) for template in rng.sample(CAPTIONS, n)]
    return texts + [alt_text(scene, rng) for _ in range(n_keywords)]


def facts() -> list[tuple[str, str]]:
    """(question, answer) about each animal's favourite food, as in Figure 1 of the paper."""
    nouns = {o: noun for _, objects in ACTIVITIES.values() for o, (_, noun) in objects.items()}
    return [(f"what do {plural(a)} eat?", f"{plural(a)} love eating {nouns[o]}.") for a, o in FAVOURITES.items()]


# --------------------------------------------------------------------------------------------------------- splits
def every_scene() -> list[Scene]:
    """All 20,736 scenes in a fixed order."""
    activities = [(verb, name) for verb, (_, objects) in ACTIVITIES.items() for name in objects]
    return [Scene(a, h, v, o, p) for a, h, (v, o), p in product(ANIMALS, HATS, activities, PLACES)]


def held_out_pairs(seed: int = 0) -> dict[str, frozenset[tuple[str, str]]]:
    """(animal, place) and (animal, object) pairs that only one split ever shows: {"validation": ..., "test": ...}.

    No animal loses its favourite food, since the facts speak of it.
    """
    rng = random.Random(f"pairs-{seed}")
    places = sorted(product(ANIMALS, PLACES))
    names = [o for _, objects in ACTIVITIES.values() for o in objects]
    objects = sorted((a, o) for a, o in product(ANIMALS, names) if FAVOURITES[a] != o)
    rng.shuffle(places)
    rng.shuffle(objects)
    return {
        "validation": frozenset(places[:3] + objects[:12]),
        "test": frozenset(places[3:9] + objects[12:36]),
    }


def splits(seed: int = 0, train: int = 10_000, validation: int = 1_800, test: int = 2_400) -> dict[str, list[Scene]]:
    """Disjoint scenes of train, validation and test.

    Half of validation and of test (as far as they reach) are scenes whose held-out pair appears in no other split;
    the rest are unseen scenes made of pairs that training shows.

    Args:
        seed: of the draw.
        train, validation, test: numbers of scenes.

    Raises:
        ValueError: the world has too few scenes.
    """
    pairs = held_out_pairs(seed)
    novel: dict[str, list[Scene]] = {"validation": [], "test": []}
    rest = []
    scenes = every_scene()
    random.Random(f"splits-{seed}").shuffle(scenes)
    for scene in scenes:
        mine = {(scene.animal, scene.place), (scene.animal, scene.object)}
        owners = [name for name, held in pairs.items() if mine & held]
        if not owners:
            rest.append(scene)
        elif len(owners) == 1:  # a scene that holds a pair of both would show test's pair to validation
            novel[owners[0]].append(scene)
    chosen = {}
    for name, count in (("validation", validation), ("test", test)):
        unseen = novel[name][: count // 2]
        seen, rest = rest[: count - len(unseen)], rest[count - len(unseen) :]
        chosen[name] = unseen + seen
        random.Random(f"{name}-{seed}").shuffle(chosen[name])
    if len(rest) < train:
        raise ValueError(f"the world has {len(rest)} scenes left for training, {train} are wanted")
    return {"train": rest[:train], **chosen}
