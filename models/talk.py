"""Short conversations between a user and an assistant, generated from a seed.

Dialogue whose licence is clear is scarce, so a part of the ``chat`` domain is made here.
"""

from __future__ import annotations

from random import Random

Turns = list[str]  # user, assistant, user, assistant ...

CITIES = [
    "Lisbon",
    "Oslo",
    "Kyoto",
    "Lima",
    "Cairo",
    "Prague",
    "Dublin",
    "Toronto",
    "Nairobi",
    "Athens",
    "Vienna",
    "Seoul",
    "Madrid",
    "Boston",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DISHES = [
    "lentil soup",
    "tomato pasta",
    "vegetable curry",
    "apple pie",
    "fried rice",
    "potato salad",
    "mushroom risotto",
]
PARTS = {
    "lentil soup": "lentils, carrots, an onion and some stock",
    "tomato pasta": "pasta, tomatoes, garlic and olive oil",
    "vegetable curry": "vegetables, coconut milk, rice and curry paste",
    "apple pie": "apples, flour, butter, sugar and cinnamon",
    "fried rice": "cooked rice, eggs, peas and soy sauce",
    "potato salad": "potatoes, mustard, vinegar and chives",
    "mushroom risotto": "rice, mushrooms, white wine and parmesan",
}
DEVICES = ["laptop", "phone", "printer", "router", "camera", "headset", "television", "keyboard"]
FAULTS = ["will not turn on", "is very slow", "keeps losing the connection", "makes a strange noise", "shows an error"]
HOBBIES = [
    "gardening",
    "chess",
    "painting",
    "running",
    "photography",
    "baking",
    "cycling",
    "playing the piano",
    "bird watching",
]
MOODS = ["tired", "nervous", "happy", "bored", "worried", "excited", "lonely", "proud"]
TOPICS = ["a birthday", "a job interview", "an exam", "moving house", "a long journey", "a wedding", "a new job"]
# The second holds two thanks by a slip; the frozen model was trained on it, so it stays.
THANKS = ["Thanks, that helps", "Thank you so much!,Great, thanks", "That is good to know", "Perfect."]
WELCOME = (
    "You are welcome! Is there anything else I can do for you?",
    "Glad I could help. Let me know if you have more questions.",
    "Any time. Have a good day!",
)
OPENERS = ("Hi!", "Hello there.", "Good morning.", "Hey,", "Excuse me,", "")


def _travel(r: Random) -> Turns:
    city, days, day = r.choice(CITIES), r.randint(2, 9), r.choice(DAYS)
    return [
        f"I would like to visit {city} for {days} days. What should I see?",
        f"{city} is a fine choice. In {days} days you can see the old town, one or two museums and a market. "
        f"If you arrive on a {day}, start with a walk along the water.",
        f"Is it better to go by train or by plane to {city}?",
        r.choice(("The train is slower, but you see more on the way.", "A plane is faster, but the train is calmer."))
        + " Book early, because prices rise in the last week.",
    ]


def _cooking(r: Random) -> Turns:
    dish, people = r.choice(DISHES), r.randint(2, 8)
    return [
        f"How do I make {dish} for {people} people?",
        f"For {dish} you need {PARTS[dish]}. First prepare the ingredients, then cook them slowly for about "
        f"{5 * r.randint(3, 9)} minutes, and season to taste. For {people} people, plan "
        f"{r.choice(('one large pot', 'two pans', 'a big bowl'))}.",
        r.choice(("Can I make it the day before?", "What can I serve with it?", "Can I freeze the rest?")),
        r.choice(("Yes, it keeps well in the fridge for two days.", "A green salad and fresh bread go well with it.")),
    ]


def _repair(r: Random) -> Turns:
    device, fault = r.choice(DEVICES), r.choice(FAULTS)
    return [
        f"My {device} {fault}. What can I do?",
        f"I am sorry to hear that. Please switch the {device} off, wait a minute and switch it on again. "
        "Then check the cable and the settings.",
        f"I tried that, but the {device} still {fault}.",
        f"Then the {device} may need an update or a repair. When did the problem start, and did you change anything?",
        f"It started on {r.choice(DAYS)}.",
        "Thank you. Please install the latest update first. If that does not help, contact the support team.",
    ]


def _meeting(r: Random) -> Turns:
    day, hour, topic = r.choice(DAYS), r.randint(8, 17), r.choice(TOPICS)
    other = r.choice([d for d in DAYS if d != day])
    return [
        f"Can you help me plan {topic}? I am free on {day} at {hour}:00.",
        f"Of course. I noted {day} at {hour}:00. What is most important to you?",
        f"I do not want to forget anything. Could we also use {other}?",
        f"Yes. Use {day} for the big things and {other} for the small ones. I suggest a short list: "
        "who comes, what you need, and what it costs.",
    ]


def _feelings(r: Random) -> Turns:
    mood, topic, hobby = r.choice(MOODS), r.choice(TOPICS), r.choice(HOBBIES)
    return [
        f"I feel {mood} because of {topic}.",
        f"It is normal to feel {mood} before {topic}. Do you want to tell me more about it?",
        f"I just need something to think about. I used to like {hobby}.",
        f"Then why not take an hour for {hobby} today? Many people say that it helps when they are {mood}.",
    ]


def _letter(r: Random) -> Turns:
    topic, city = r.choice(TOPICS), r.choice(CITIES)
    return [
        f"Write a short message to a friend in {city} about {topic}.",
        f"Dear friend, I hope all is well in {city}. I am writing to you about {topic}. "
        f"It would mean a lot to me if you could come on {r.choice(DAYS)}. Warm wishes!",
        r.choice(("Make it more formal, please.", "Can you make it shorter?")),
        f"Dear Sir or Madam, I would like to inform you about {topic}. I would be glad to meet you in {city}. "
        "Yours sincerely.",
    ]


def _hobby(r: Random) -> Turns:
    a, b = r.sample(HOBBIES, 2)
    return [
        f"What is a good hobby for someone who likes {a}?",
        f"If you enjoy {a}, you might also like {b}. Both are calm and you can learn them step by step.",
        f"How much time do I need for {b}?",
        f"About {r.randint(1, 5)} hours a week are enough to begin with {b}. Start small and be patient.",
    ]


KINDS = (_travel, _cooking, _repair, _meeting, _feelings, _letter, _hobby)


def conversation(random: Random) -> Turns:
    """The turns of one conversation, the user's first; an even number of them."""
    turns = random.choice(KINDS)(random)
    turns[0] = f"{random.choice(OPENERS)} {turns[0]}".strip()
    if random.random() < 0.4:
        turns += [random.choice(THANKS).rstrip(".!") + ".", random.choice(WELCOME)]
    return turns
