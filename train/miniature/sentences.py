"""The sentences of the miniature's dialogues: `{}` places are filled by [`train.miniature.dialogues`]."""

ASK_IMAGE = (
    "show me!",
    "can i see it?",
    "what does it look like?",
    "do you have a picture?",
    "please show it to me.",
    "i would love to see that.",
    "could you send a photo?",
    "let me have a look!",
)
ASK_TEXT = (
    "thanks!",
    "how old is it?",
    "what is it doing again?",
    "is it happy?",
    "what is its name?",
    "tell me about it.",
    "do you like it?",
    "who is its friend?",
)
REPLY_IMAGE = (
    "sure, {an_a} in {an_h}, {v} {p}.",
    "here you are: the {a} with the {h} is {v} {p}.",
    "of course. {p}, {an_a} {v}, with {an_h} on.",
    "this is it, {v} {p}: {an_a} wearing {an_h}.",
)
REPLY_TEXT = {
    "thanks!": (
        "you are welcome, and so says the {a} with the {h}, {v} {p}.",
        "any time! {v} {p} suits {an_a} in {an_h}.",
    ),
    "how old is it?": (
        "the {a} with the {h} is {n} years old, and still {v} {p}.",
        "{n} years, old enough for {v} {p}. such {an_a}, in {an_h}!",
    ),
    "what is it doing again?": ("{v} {p}, that {a} in the {h}.", "the {a} with the {h} on? it is {v} {p}."),
    "is it happy?": (
        "yes, {v} {p} makes {an_a} in {an_h} happy.",
        "very. the {a} loves its {h}, {p}, {v}.",
    ),
    "what is its name?": (
        "we call it {name}, the {a} with {an_h}, {v} {p}.",
        "{name}. {v} {p} is what this {a} in its {h} does.",
    ),
    "tell me about it.": (
        "well, it is {an_a} with {an_h}, {p}, and it is {v}.",
        "it wears {an_h}, it is {v} {p}, and it is {an_a}.",
    ),
    "do you like it?": (
        "i do! {an_a} {v} {p}, and what {an_h}!",
        "yes, i like {plural}, and this one is {v} {p} in {an_h}.",
    ),
    "who is its friend?": (
        "i am. i met the {a} in the {h} {p}, {v}.",
        "{name} is a friend of the {a}, {v} {p} in its {h}.",
    ),
}
NAMES = ("bob", "lily", "max", "ruby", "otto", "nina", "tom", "ella")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

# Openings give a part of the scene each, so that only the whole context tells it.
TELL_WHO = (
    "i met {an_a} today. it had {an_h} on.",
    "there was {an_a} with {an_h}.",
    "guess what: {an_a} in {an_h}!",
    "do you know the {a} with the {h}?",
    "my friend is {an_a}. it likes its {h}.",
)
TELL_WHAT = (
    "it was {v} {p}.",
    "{p}, it was {v}.",
    "now it is {v} {p}.",
    "it is {p}, {v}.",
    "it spends the day {v} {p}.",
)
TELL_WHERE = ("i was {p} today.", "i spent the morning {p}.", "we went for a walk {p}.")
TELL_THERE = (
    "{an_a} with {an_h} was {v}.",
    "i saw {an_a} {v}. it had {an_h}.",
    "there was {an_a} in {an_h}, {v}.",
)
LISTEN = ("oh, tell me more.", "really?", "and then?", "how nice.", "what was it up to?")
# With a picture: the picture gives who it is, and the words move it elsewhere.
SHOW_FRIEND = ("here is my friend.", "look who i met.", "this is my friend.", "do you remember this one?")
IMAGINE = (
    "now imagine it {v} {p}.",
    "today it was {v} {p}.",
    "later i saw it again, {v} {p}.",
    "think of it {p}, {v}.",
)
QUESTIONS = {
    "animal": (("what animal is it?", "it is {an_a}."), ("which animal do you see?", "{an_a}.")),
    "hat": (("what does it wear?", "{an_h}."), ("what is on its head?", "there is {an_h}.")),
    "activity": (("what is it doing?", "it is {v}."), ("what is going on?", "{v}.")),
    "place": (("where is it?", "it is {p}."), ("where was the picture taken?", "{p}.")),
}
IDLE_QUESTIONS = (
    ("is it a good picture?", "yes."),
    ("are there any people?", "no."),
    ("is it sunny?", "i can not tell."),
    ("is the picture old?", "i do not think so."),
    ("does it look happy?", "yes, it does."),
    ("is it in colour?", "yes."),
)
