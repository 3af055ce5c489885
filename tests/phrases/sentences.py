"""Captions in the manner of the public benchmarks, written for these tests, with what a reader would mark."""

# (caption, [(phrase, part), ...])
SENTENCES = [
    (
        "The man has short dark hair and is wearing a blue and white checkered shirt with rolled-up sleeves, grey "
        "trousers and brown leather loafers.",
        [
            ("short dark hair", "head"),
            ("blue and white checkered shirt with rolled-up sleeves", "upper"),
            ("grey trousers", "lower"),
            ("brown leather loafers", "feet"),
        ],
    ),
    (
        "A girl with her hair up in a ponytail walks with a lime green bag slung across her body.",
        [("ponytail", "head"), ("lime green bag", "carried")],
    ),
    (
        "This woman wears a long, flowing maroon skirt, a sleeveless cream top and flat silver sandals.",
        [("long, flowing maroon skirt", "lower"), ("sleeveless cream top", "upper"), ("flat silver sandals", "feet")],
    ),
    (
        "The guy in the picture is dressed in an olive parka over a charcoal hoodie; his jeans are faded black.",
        [("olive parka", "upper"), ("charcoal hoodie", "upper"), ("jeans are faded black", "lower")],
    ),
    (
        "She is walking to the left, looking down at the white mobile phone she holds in both hands.",
        [("white mobile phone", "carried")],
    ),
    (
        "An elderly man leaning on a wooden walking stick, wearing a flat cap, a tweed jacket and beige corduroys.",
        [
            ("wooden walking stick", "carried"),
            ("flat cap", "head"),
            ("tweed jacket", "upper"),
            ("beige corduroys", "whole"),
        ],
    ),
    (
        "He wears an orange safety vest, a yellow hard hat, dark work pants and muddy boots.",
        [
            ("orange safety vest", "upper"),
            ("yellow hard hat", "head"),
            ("dark work pants", "lower"),
            ("muddy boots", "feet"),
        ],
    ),
    (
        "The pedestrian has shoulder length brown hair, thin-framed glasses, and a purple lanyard around the neck.",
        [("shoulder length brown hair", "head"), ("thin-framed glasses", "head"), ("purple lanyard", "upper")],
    ),
    (
        "Lady in a red polka dot dress with a wide black belt, carrying two plastic grocery bags.",
        [("red polka dot dress", "whole"), ("wide black belt", "lower"), ("plastic grocery bags", "carried")],
    ),
    (
        "A student with a turquoise JanSport backpack on both shoulders and white earphones in his ears.",
        [("turquoise JanSport backpack", "carried"), ("white earphones", "head")],
    ),
    (
        "Her blouse is pale yellow and has a bow at the neck. She is wearing it with a tight, black pencil skirt.",
        [("blouse is pale yellow", "upper"), ("tight, black pencil skirt", "lower")],
    ),
    (
        "The boy's t-shirt says 'Brooklyn' in big letters, and he has knee-length camouflage shorts on.",
        [("t-shirt", "upper"), ("knee-length camouflage shorts", "lower")],
    ),
    (
        "A tall, thin man with a shaved head. White v-neck tee, black joggers, red high tops.",
        [("shaved head", "head"), ("White v-neck tee", "upper"), ("black joggers", "lower"), ("red high tops", "feet")],
    ),
    (
        "The person is pushing a silver bicycle with one hand and wears a bright pink rain jacket with the hood up.",
        [("silver bicycle", "carried"), ("bright pink rain jacket with the hood", "upper")],
    ),
    (
        "Woman wearing a navy blazer, matching navy slacks, black pumps and carrying a brown leather briefcase.",
        [
            ("navy blazer", "upper"),
            ("matching navy slacks", "lower"),
            ("black pumps", "feet"),
            ("brown leather briefcase", "carried"),
        ],
    ),
    (
        "It is hard to see the face, but the coat looks dark green and there is a yellow umbrella above the head.",
        [("coat", "upper"), ("yellow umbrella", "carried")],
    ),
    (
        "M/40s, salt and pepper hair, gray sweatpants, no shirt, white towel over shoulder",
        [("salt and pepper hair", "head"), ("gray sweatpants", "lower"), ("white towel", "carried")],
    ),
    (
        "He carries a skateboard under his arm and a crumpled magenta sombrero in his hand.",
        [("skateboard", "carried"), ("crumpled magenta sombrero", "carried")],
    ),
    (
        "The woman faces the camera. She has a green and gold sari, a red bindi and several bangles.",
        [("green and gold sari", "whole"), ("red bindi", "whole"), ("bangles", "upper")],
    ),
    (
        "Young male in a white lab coat, light blue shirt, striped tie and khakis.",
        [("white lab coat", "upper"), ("light blue shirt", "upper"), ("striped tie", "upper"), ("khakis", "lower")],
    ),
    (
        "Upper body: grey hoodie. Lower body: black tights. Shoes: neon yellow trainers. Bag: none.",
        [("grey hoodie", "upper"), ("black tights", "lower"), ("neon yellow trainers", "feet")],
    ),
    (
        "A man who is bald on top wears a black T-shirt tucked into stonewashed jeans with a brown belt.",
        [("black T-shirt", "upper"), ("stonewashed jeans", "lower"), ("brown belt", "lower")],
    ),
    (
        "The lady's hair is long and blonde and she is in a short, sparkly gold dress and strappy heels.",
        [("hair is long and blonde", "head"), ("short, sparkly gold dress", "whole"), ("strappy heels", "feet")],
    ),
    (
        "Wearing a black beanie and a puffy, dark purple coat that goes down to the knees, he stands with his back to "
        "us.",
        [("black beanie", "head"), ("puffy, dark purple coat", "upper")],
    ),
    (
        "a kid with a dinosaur rucksack, red wellies and a see-through poncho",
        [("dinosaur rucksack", "carried"), ("red wellies", "feet"), ("see-through poncho", "upper")],
    ),
    (
        "The man's shoes are white, his shorts are blue and he holds a half-empty plastic bottle of water.",
        [("shoes are white", "feet"), ("shorts are blue", "lower"), ("half-empty plastic bottle", "carried")],
    ),
]
