"""Twenty questions that examples/data/nanoda.jsonl does not hold, with words of a right answer.

The demo model's base, greedy, answers nearly all of them right: what an adapter forgets shows. They
were chosen before any adapter was trained on that set; only the words about the moon were narrowed
later, as "silver in the sky" passed for right.
"""

SPORTS = "soccer|football|basketball|baseball|tennis|swimming|hockey|golf|volleyball|rugby|cricket"
QUESTIONS = {
    "What is the capital of Germany?": r"\bberlin\b",
    "What is the capital of Greece?": r"\bathens\b",
    "Which planet do we live on?": r"\bearth\b",
    "What is the largest ocean on Earth?": r"\bpacific\b",
    "Who painted the Mona Lisa?": r"\bleonardo\b|\bda vinci\b",
    "Who discovered gravity?": r"\bnewton\b",
    "What is the opposite of up?": r"\bdown\b",
    "How many legs does a dog have?": r"\b(4|four)\b",
    "Which organ pumps blood through the body?": r"\bheart\b",
    "What is the main ingredient of bread?": r"\b(flour|wheat)\b",
    "Who invented the telephone?": r"\bbell\b",
    "Where is the Eiffel Tower?": r"\b(paris|france)\b",
    "What is the red planet?": r"\bmars\b",
    "Who developed the theory of relativity?": r"\beinstein\b",
    "What is the chemical symbol for gold?": r"\bau\b",
    "What currency is used in Japan?": r"\byen\b",
    "What is photosynthesis?": r"\b(plants?|sunlight|light)\b",
    "What does a doctor do?": r"\b(patients?|sick|ill|diseases?|illness(es)?|medic\w+|treats?)\b",
    "Tell me something about the moon.": r"\b(orbit\w*|satellite|night|craters?|tides?|round)\b",
    "Name a sport.": rf"\b({SPORTS})\b",
}
