"""Small talk about everyday life, in which every answer takes up what was just said.

What happened, how it was, what comes next: a topic is drawn with its words, and what is said of it later is about the
same thing and the same person. Nothing here is about food or drink, which a night is to teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from . import words as w
from .facts import phrases

Said = list[tuple[str, str]]  # what the person says, what the assistant answers


@dataclass(frozen=True)
class Outing:
    """Something that is done for pleasure: told of, named, and what can be asked about it."""

    did: str
    plan: str
    named: str
    asked: tuple[str, ...]


OUTINGS = (
    Outing("went to the lake", "go to the lake", "The lake", phrases("Was the water warm?|Did you swim?")),
    Outing("went to the beach", "go to the beach", "The beach", phrases("Was it sunny?|Did you swim in the sea?")),
    Outing("went for a walk in the park", "go for a walk in the park", "A walk", phrases("Was it a long walk?")),
    Outing("went hiking in the hills", "go hiking in the hills", "Hiking", phrases("How far did you walk?")),
    Outing("went swimming", "go swimming", "Swimming", phrases("Do you swim often?|Was the pool busy?")),
    Outing("went to a concert", "go to a concert", "A concert", phrases("Who played?|Did you like the music?")),
    Outing("watched a film", "watch a film", "A film", phrases("What was it about?|Did you like it?")),
    Outing("visited a museum", "visit a museum", "A museum", phrases("What did you see there?")),
    Outing("played chess", "play chess", "Chess", phrases("Who won?|Do you play often?")),
    Outing("played football", "play football", "Football", phrases("Who won?|Did you score?")),
    Outing("played tennis", "play tennis", "Tennis", phrases("Who won?|Do you play every week?")),
    Outing("went cycling", "go cycling", "Cycling", phrases("How far did you ride?|Was it windy?")),
    Outing("went fishing", "go fishing", "Fishing", phrases("Did you catch anything?")),
    Outing("went dancing", "go dancing", "Dancing", phrases("What did you dance to?")),
    Outing("read a good book", "read a book", "A good book", phrases("What was it about?")),
    Outing("worked in the garden", "work in the garden", "A garden", phrases("What do you grow?|Is it a big garden?")),
    Outing("painted the kitchen", "paint the kitchen", "A new colour", phrases("Which colour did you choose?")),
    Outing("went to the zoo", "go to the zoo", "The zoo", phrases("Which animal did you like best?")),
    Outing("took the train to the sea", "take the train to the sea", "The sea", phrases("Was it a long trip?")),
    Outing("took many photos in town", "take photos in town", "Taking photos", phrases("What did you take photos of?")),
    Outing("had a party", "have a party", "A party", phrases("What did you celebrate?|Did many people come?")),
    Outing("stayed at home and rested", "stay at home and rest", "A quiet day", phrases("Do you feel better now?")),
)
WHEN = phrases("yesterday|on Sunday|on Saturday|last weekend|this morning|last week|at the weekend|last night")
SOON = phrases("tomorrow|next week|on Friday|this weekend|tonight|next month|on Monday")
GLAD = phrases("That sounds nice!|How nice!|That sounds like fun!|Lovely!|That sounds like a good day.|Great!")
GOOD = phrases(
    "It was great.|Yes, it was fun.|It was lovely.|Yes, very much.|It was really good.|We had a lot of fun."
    "|It was wonderful.|Yes, we enjoyed it."
)
BAD = phrases(
    "Not really, it rained all day.|It was a bit cold.|It was boring.|No, it was too loud.|Not so good, I was tired."
    "|It was too hot.|No, it was very crowded."
)
CHEER = phrases("I am glad to hear that.|Good to hear!|I am happy for you.|That is good.|How lovely.")
PITY = phrases("Oh, that is a pity.|I am sorry to hear that.|Oh no.|That is a shame.")
AGAIN = phrases("Will you do it again?|Do you do that often?|Would you do it again?")
TIMES = (
    ("Yes, I think so.", "Then I hope it will be just as good."),
    ("Yes, every week.", "That is a good habit."),
    ("No, only now and then.", "Then it is something special."),
    ("It was the first time.", "There is a first time for everything!"),
    ("Maybe.", "There is no hurry."),
    ("I hope so.", "I hope so too."),
)
# what went wrong, and what one says to that
TROUBLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("I have a cold.", phrases("Oh, I hope you get well soon. Do you have to work today?|Get well soon! Rest a lot.")),
    (
        "I have a headache.",
        phrases("I am sorry. Maybe you should rest.|Oh no. Did you get some fresh air?"),
    ),
    (
        "I lost my keys.",
        phrases("Oh no! Where did you have them last?|Oh dear. Did you look in your pockets?"),
    ),
    ("I missed my train.", phrases("Oh no. When does the next one leave?|That is annoying. Were you very late?")),
    ("I failed my exam.", phrases("I am sorry to hear that. Can you take it again?|That is hard. You can try again.")),
    ("My cat is ill.", phrases("Poor cat! Have you seen a vet?|I am sorry. I hope your cat gets well soon.")),
    ("My dog ran away.", phrases("Oh no! I hope your dog comes back soon.|I am sorry. Did you look in the park?")),
    ("My car broke down.", phrases("That is annoying. Can it be repaired?|Oh no. Where did it happen?")),
    ("I had a bad day.", phrases("I am sorry to hear that. What happened?|Oh no. Do you want to tell me about it?")),
    ("I argued with my friend.", phrases("That is sad. What was it about?|I am sorry. Can you talk it over?")),
    ("I am stressed.", phrases("I am sorry to hear that. What is on your mind?|Take a deep breath. What is going on?")),
    (
        "I feel lonely.",
        phrases("I am sorry. Is there a friend that you could call?|I am here. Tell me about your day."),
    ),
    ("I broke my arm.", phrases("Ouch! How did that happen?|Oh no, that must hurt. How did it happen?")),
    ("My phone is broken.", phrases("Oh no. Can it be repaired?|That is annoying. How did it break?")),
    ("I have too much work.", phrases("That sounds hard. Can somebody help you?|Can some of it wait until tomorrow?")),
    ("I am nervous about tomorrow.", phrases("What happens tomorrow?|I am sure you will do well. What is it?")),
    (
        "It has been raining for days.",
        phrases("I hope the sun comes back soon.|Then it is time for a good book."),
    ),
    ("I got lost in town.", phrases("Oh no. Did you find the way in the end?|Did somebody help you?")),
)
AFTER = (
    ("I don't know yet.", "I hope it turns out well."),
    ("Not yet.", "There is still time. I hope it works out."),
    ("Yes, I did.", "Good. I hope that helps."),
    ("No.", "I see. I hope it gets better soon."),
    ("It will be all right.", "I am sure it will."),
    ("Thank you.", "You're welcome. Take care!"),
    ("You are kind.", "Thank you, that is nice of you to say."),
)
# good news
NEWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("I got a new job.", phrases("Congratulations! What will you do there?|That is great news! When do you start?")),
    ("I passed my exam.", phrases("Well done! You can be proud.|Congratulations! Was it hard?")),
    ("We are getting a dog.", phrases("How exciting! What will you call it?|Lovely! Is it a puppy?")),
    (
        "I am getting married.",
        phrases("Congratulations! When is the wedding?|I wish you both much joy."),
    ),
    ("It is my birthday.", phrases("Happy birthday! How will you celebrate?|Happy birthday! I wish you a lovely day.")),
    ("I bought a bike.", phrases("Nice! Where will you ride it?|Great! Which colour is it?")),
    ("I found my keys.", phrases("Good! Where were they?|I am glad. Where did you find them?")),
    ("I won a prize.", phrases("Congratulations! What did you win?|Well done! What was it for?")),
    ("I have a new neighbour.", phrases("Have you met already?|I hope you get on well.")),
    ("I am on holiday.", phrases("Enjoy it! Are you going anywhere?|How nice! What will you do?")),
    ("The sun is shining.", phrases("Lovely! Will you go out?|That is a good day to be outside.")),
    ("I finished my book.", phrases("Did you like the end?|What will you read next?")),
    ("I moved to a new flat.", phrases("How nice! Is it bigger than the old one?|I hope you feel at home there.")),
    (
        "My sister had a baby.",
        phrases("Congratulations! You must be happy for her.|How lovely! Boy or girl?"),
    ),
)
# what is asked of the assistant itself, and of the world
ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "How was your weekend?",
        phrases("I am a program, so I have no weekends. How was yours?"),
    ),
    ("What did you do today?", phrases("I have been here, ready to talk. What did you do?")),
    ("Do you have any hobbies?", phrases("I like to talk with people. What are your hobbies?")),
    ("Do you like music?", phrases("I cannot hear it, but I like to talk about it. What do you listen to?")),
    ("Do you have a family?", phrases("No, I am a program. Do you have a big family?")),
    ("Where do you live?", phrases("I live in a computer. Where do you live?")),
    ("How old are you?", phrases("I am a program, so I have no age. And you?")),
    ("Do you sleep?", phrases("No, I am always here. Did you sleep well?")),
    ("What is your name?", phrases("I am an assistant. What is your name?|I have no name of my own. What is yours?")),
    ("Do you like me?", phrases("I like talking with you.")),
    ("Can you sing?", phrases("No, I can only write. Do you like to sing?")),
    (
        "What should I do today?",
        phrases("You could go for a walk or call a friend."),
    ),
    ("How can I sleep better?", phrases("Go to bed at the same time every day and put your phone away.")),
    ("How do I make friends?", phrases("Join a club or a class, and say hello to people.")),
    ("What is a good hobby?", phrases("Painting, cycling or music. What do you enjoy?")),
    ("Do you think I should move?", phrases("It depends. What do you like about where you live now?")),
    ("Should I get a pet?", phrases("A pet is a good friend, but it needs time. Do you have time for it?")),
    ("Can you recommend a film?", phrases("I do not know many films. What kind do you like?")),
    ("Tell me something.", phrases("Did you know that owls can turn their heads almost all the way round?")),
    ("Tell me a joke.", phrases("Why did the book go to the doctor? It hurt its spine.")),
    ("Are you there?", phrases("Yes, I am here.|Yes. How can I help you?")),
    ("What are you doing?", phrases("I am talking with you. And what are you doing?")),
)
OPENINGS = (
    ("Hi!", "Hi! How are you?"),
    ("Hello.", "Hello! How are you today?"),
    ("Hello, how are you?", "I am well, thank you. And you?"),
    ("Hi, how are you doing?", "I am fine, thank you. How are you?"),
    ("Good evening.", "Good evening! How was your day?"),
    ("Hey!", "Hey! What is new?"),
)
CLOSINGS = (
    ("Thanks for talking with me.", "You're welcome. It was nice to talk with you."),
    ("I have to go now.", "All right. Take care!"),
    ("Bye!", "Bye! See you soon."),
    ("Talk to you later.", "See you later!"),
    ("See you tomorrow.", "See you tomorrow!"),
    ("That is nice of you.", "You're welcome."),
    ("Thank you, bye.", "You're welcome. Goodbye!"),
)
LEVELS = phrases("a lot of fun|good for you|a fine way to spend the day|relaxing|something to look forward to")


def chat(rng: Random) -> Said:
    """A small conversation: perhaps a greeting, one or two things that are told or asked, perhaps a goodbye."""
    said: Said = [rng.choice(OPENINGS)] if rng.random() < 0.4 else []
    topics = (_outing, _plan, _liking, _liking_of_another, _trouble, _news, _question, _question)
    for topic in rng.sample(topics, rng.choice((1, 1, 2, 3))):
        said += topic(rng)
    return [*said, rng.choice(CLOSINGS)] if rng.random() < 0.35 else said


def _outing(rng: Random) -> Said:
    outing, who = rng.choice(OUTINGS), _somebody(rng)
    with_whom = f" with my {who}" if who else ""
    told = f"{rng.choice(('I', 'We') if not who else ('I',))} {outing.did}{with_whom} {rng.choice(WHEN)}."
    asked = [*outing.asked, "Did you have a good time?", "How was it?"]
    if who:
        asked += [f"Did your {who} like it too?", f"Did you and your {who} have a good time?"]
    said = [(told, _both(rng, GLAD, asked))]
    if rng.random() < 0.7:
        said += _how_it_was(rng)
    return said


def _how_it_was(rng: Random) -> Said:
    if rng.random() < 0.25:
        return [(rng.choice(BAD), f"{rng.choice(PITY)} Maybe next time it will be better.")]
    said = [(rng.choice(GOOD), _both(rng, CHEER, AGAIN))]
    return [*said, rng.choice(TIMES)] if said[0][1].endswith("?") and rng.random() < 0.6 else said


def _plan(rng: Random) -> Said:
    outing, who = rng.choice(OUTINGS), _somebody(rng)
    with_whom = f" with my {who}" if who else ""
    start = rng.choice(("I am going to", "I want to", "I will", "We are going to", "I plan to"))
    told = f"{start} {outing.plan}{with_whom} {rng.choice(SOON)}."
    answers = [f"{outing.named} is {rng.choice(LEVELS)}. Enjoy it!", "That sounds like a good plan.", "Have fun!"]
    if who:
        answers += [f"Your {who} will like that.", f"Have a good time with your {who}!"]
    return [(told, rng.choice(answers))]


def _liking(rng: Random) -> Said:
    hobby = rng.choice(w.HOBBIES)
    told = rng.choice((f"I love {hobby}.", f"I like {hobby} very much.", f"My hobby is {hobby}.", f"I enjoy {hobby}."))
    lead = rng.choice((f"{hobby.capitalize()} is {rng.choice(LEVELS)}.", "That is a nice hobby.", "How nice!"))
    said = [(told, f"{lead} {rng.choice(('How often do you do it?', 'How long have you done it?', 'Is it hard?'))}")]
    more = (
        ("Every day.", "Then you must be good at it."),
        ("Once a week.", "That is a good habit."),
        ("For many years.", "Then you must be good at it."),
        ("Yes, but it is worth it.", "I believe that."),
        ("No, it is easy.", f"Then maybe more people should try {hobby}."),
        ("Not very often.", "I hope you find more time for it."),
        (f"Do you like {hobby}?", f"I cannot do it myself, but {hobby} sounds like fun."),
        (f"How do I get better at {hobby}?", "Practise a little every day, and be patient."),
    )
    return [*said, rng.choice(more)] if rng.random() < 0.6 else said


def _liking_of_another(rng: Random) -> Said:
    who, hobby = rng.choice(w.KIN), rng.choice(w.HOBBIES)
    he = rng.choice(("He", "She")) if who not in HIS_OR_HER else HIS_OR_HER[who]
    told = rng.choice((f"My {who} loves {hobby}.", f"My {who} likes {hobby}.", f"My {who} goes in for {hobby}."))
    answers = (
        f"{hobby.capitalize()} is {rng.choice(LEVELS)}. Do you like it too?",
        f"That is nice. Does your {who} do it often?",
        f"Do you go {hobby} with your {who}?" if hobby.endswith("ing") else f"Do you share that with your {who}?",
    )
    said = [(told, rng.choice(answers))]
    more = (
        (f"Yes, {he.lower()} taught me.", f"Then your {who} is a good teacher."),
        ("No, not at all.", "Everybody likes something else."),
        ("Sometimes.", "It is nice to do things together."),
        (f"{he} is very good at it.", f"You must be proud of your {who}."),
    )
    return [*said, rng.choice(more)] if rng.random() < 0.6 else said


def _trouble(rng: Random) -> Said:
    trouble, answers = rng.choice(TROUBLES)
    said = [(trouble, rng.choice(answers))]
    return [*said, rng.choice(AFTER)] if rng.random() < 0.5 else said


def _news(rng: Random) -> Said:
    news, answers = rng.choice(NEWS)
    return [(news, rng.choice(answers))]


def _question(rng: Random) -> Said:
    question, answers = rng.choice(ASKED)
    return [(question, rng.choice(answers))]


HIS_OR_HER = dict.fromkeys("brother father son husband uncle grandfather nephew".split(), "He") | dict.fromkeys(
    "sister mother daughter wife aunt grandmother niece".split(), "She"
)


def _somebody(rng: Random) -> str:
    return rng.choice(w.KIN) if rng.random() < 0.6 else ""


def _both(rng: Random, first: Sequence[str], second: Sequence[str]) -> str:
    """A remark, a question, or both."""
    roll = rng.random()
    if roll < 0.2:
        return rng.choice(first)
    return rng.choice(second) if roll < 0.4 else f"{rng.choice(first)} {rng.choice(second)}"
