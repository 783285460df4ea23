"""The words of the demo world: who, what, where, and what follows from what."""

GIRLS = "Mia Lily Anna Rosa Emma Zoe Ella Ivy Nora Ruby Clara Lucy".split()
BOYS = "Tom Ben Max Sam Leo Jack Finn Hugo Oscar Adam Paul Noah".split()
NAMES = GIRLS + BOYS
ADULTS = ["Grandma", "Grandpa", "Mom", "Dad", "Aunt May", "Uncle Bob"]

COLOURS = "red blue green yellow white black brown pink purple orange grey golden".split()
THINGS = (
    "ball kite hat book cup box doll drum bell lamp boat ring scarf bag basket spoon blanket key "
    "robot flute brush mirror ribbon bucket shovel whistle map clock pillow mask"
).split()

COUNTABLES = {
    "apple": "apples",
    "pear": "pears",
    "plum": "plums",
    "nut": "nuts",
    "cookie": "cookies",
    "cherry": "cherries",
    "carrot": "carrots",
    "cake": "cakes",
    "stone": "stones",
    "flower": "flowers",
    "shell": "shells",
    "coin": "coins",
    "button": "buttons",
    "candle": "candles",
    "marble": "marbles",
    "feather": "feathers",
}
EDIBLE = "apple pear plum nut cookie cherry carrot cake".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve"
).split()

PLACES = {
    "garden": "in",
    "kitchen": "in",
    "forest": "in",
    "barn": "in",
    "library": "in",
    "attic": "in",
    "cave": "in",
    "tower": "in",
    "park": "at",
    "beach": "at",
    "market": "at",
    "school": "at",
    "farm": "at",
    "shop": "at",
    "river": "by",
    "lake": "by",
    "pond": "by",
    "bridge": "on",
    "hill": "on",
    "meadow": "in",
}
SIGHTS = {
    "garden": ["The roses smelled sweet.", "Bees were busy in the flowers."],
    "kitchen": ["A pot of soup was on the stove.", "It smelled like fresh bread."],
    "forest": ["The trees were tall and still.", "A bird sang high in a tree."],
    "barn": ["The hay was dry and warm.", "A cow looked up and said moo."],
    "library": ["It was very quiet there.", "There were books on every wall."],
    "attic": ["There was dust on the old boxes.", "A little light came in from the roof."],
    "cave": ["It was dark and cool inside.", "Drops of water fell from the rocks."],
    "tower": ["There were many steps to the top.", "The wind sang in the windows."],
    "park": ["Children were playing on the swings.", "The grass was green and soft."],
    "beach": ["The waves were big and blue.", "The sand was warm."],
    "market": ["People were selling fruit and fish.", "It was full of people."],
    "school": ["The bell rang two times.", "The rooms were empty and clean."],
    "farm": ["The hens ran around in the mud.", "A horse stood by the fence."],
    "shop": ["There were sweets in tall jars.", "The door went ding when it opened."],
    "river": ["The water ran fast.", "Little fish swam by the stones."],
    "lake": ["The water was still like glass.", "Two swans swam by."],
    "pond": ["The frogs were loud.", "A duck slept in the reeds."],
    "bridge": ["The water ran under it.", "The old wood made a funny sound."],
    "hill": ["From there you could see the whole town.", "The wind was strong."],
    "meadow": ["The grass was full of butterflies.", "A lamb was sleeping in the sun."],
}
SPOTS = ["under a tree", "behind a wall", "near the path", "on the ground", "on a bench"]

ANIMALS = "cat dog rabbit duck mouse fox owl frog hen goat pony turtle".split()
PETS = "Biscuit Pepper Coco Fluffy Shadow Snowy Lucky Sunny".split()
SIZES = ["small", "big", "little", "fat", "thin"]
ANTICS = [
    "jumped over a log",
    "ran in circles",
    "rolled in the grass",
    "hid behind a bush",
    "made a funny noise",
    "fell asleep at once",
    "looked for food",
    "chased a leaf",
]
TRAITS = "kind brave clever shy funny quiet cheerful curious".split()

NEEDS = {
    "hungry": ("ate some bread", "eat some bread"),
    "thirsty": ("drank some water", "drink some water"),
    "tired": ("sat down to rest", "sit down to rest"),
    "cold": ("put on a warm coat", "put on a warm coat"),
    "hot": ("took off the thick coat", "take off the thick coat"),
    "dirty": ("washed with soap", "wash with soap"),
    "scared": ("called for help", "call for help"),
    "bored": ("started a new game", "start a new game"),
    "sad": ("cried a little", "cry a little"),
    "happy": ("laughed out loud", "laugh out loud"),
    "sleepy": ("went to bed early", "go to bed early"),
    "late": ("ran very fast", "run very fast"),
}
"""Each feeling with what one does about it: in the past tense, and as a bare verb."""

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "wet": "dry",
    "old": "new",
    "fast": "slow",
    "heavy": "light",
    "clean": "dirty",
    "full": "empty",
    "soft": "hard",
    "long": "short",
    "loud": "quiet",
    "open": "closed",
    "dark": "bright",
    "high": "low",
    "thick": "thin",
    "near": "far",
}
DESCRIBED = {
    "soup": ["hot", "thick"],
    "door": ["open", "old", "high", "heavy"],
    "towel": ["wet", "clean", "soft", "thick"],
    "stone wall": ["high", "old", "long"],
    "cart": ["full", "heavy", "fast", "old"],
    "road": ["long", "wet", "dark"],
    "music": ["loud", "fast"],
    "bed": ["soft", "big", "clean"],
    "room": ["dark", "clean", "full", "big"],
    "village": ["near", "big", "old", "loud"],
}
WEATHER = [
    "It was a sunny day.",
    "It was a cold and windy day.",
    "It was raining a little that day.",
    "There was snow on the roofs.",
    "It was early in the morning.",
    "The sky was grey.",
]
THANKS = ["Thank you", "How kind of you", "What a nice gift", "I will take good care of it"]
ENDINGS = [
    "It was a good day.",
    "They were all very happy.",
    "They sang a song and went home.",
    "They were tired, but they smiled.",
    "That night they dreamed of new adventures.",
    "And they stayed friends for ever.",
]
