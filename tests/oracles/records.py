"""A record of every layout of editing data that the kit reads, as published files spell them."""

COUNTERFACT = {
    "case_id": 7,
    "prompt": "The mother tongue of X is",
    "target_new": "Greek",
    "subject": "X",
    "ground_truth": "French",
    "rephrase_prompt": "X speaks",
    "locality_prompt": "The mother tongue of Y is",
    "locality_ground_truth": "French",
}
ZSRE = {
    "subject": "X",
    "src": "Who made X?",
    "pred": "a",
    "rephrase": "X was made by whom?",
    "alt": "Bo",
    "answers": ["Al"],
    "loc": "nq question: who",
    "loc_ans": "me",
    "cond": "",
}
OWN = {
    "prompt": "The capital of X is",
    "target_new": "Lima",
    "paraphrases": ["X is run from"],
    "neighbours": [{"prompt": "The capital of Y is", "answer": "Rome"}, "The capital of Z is"],
    "relation": "capital",
}
ROME = {
    "case_id": 3,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "X",
        "target_new": {"str": "harp", "id": "Q1"},
        "target_true": {"str": "viola", "id": "Q2"},
    },
    "paraphrase_prompts": ["Early life. X performs on the", "X, a master of the"],
    "neighborhood_prompts": ["Y plays the", {"prompt": "Z plays the", "target": "flute"}],
    "attribute_prompts": ["W plays the"],
    "generation_prompts": ["X is known for"],
}
RECENT = {
    "subject": "X",
    "prompt": "The birthplace of X is",
    "target_new": "Bonn",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is X German?", "ground_truth": [["yes"], ["true"]]}],
        "Reasoning": [{"prompt": "Its river is", "ground_truth": [["Rhine", "Rhein"]]}],
        "Subject_Aliasing": [{"prompt": "The birthplace of Mr X is", "ground_truth": []}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": ["The father of X is"], "ground_truth": [["Y", "Sir Y"]]}
        ]
    },
}
WIKIBIO = {
    "text": "This is a passage about X. X was a doctor.",
    "labels": "He studied in London.",
    "concept": "X",
    "locality": {"Relation_Specificity": [{"prompt": "X worked in", "ground_truth": ["medicine"]}]},
}
KNOWEDIT_ZSRE = {
    "subject": "X",
    "target_new": "Noctua",
    "prompt": "Which family has X?",
    "ground_truth": ["Aspido"],
    "rephrase_prompt": "What family is X of?",
    "cond": "",
    "locality": {
        "Relation_Specificity": [{"prompt": "X rank", "ground_truth": ["genus"]}],
        "Forgetfulness": None,
    },
    "portability": {"Reasoning": [{"prompt": "What are they called?", "ground_truth": "Owls"}]},
}
LISTS = {
    "case_id": "z0",
    "prompt": "Where is X?",
    "subject": "X",
    "target_new": "Peru",
    "ground_truth": "Chad",
    "rephrase_prompt": ["In which state is X?", "X is where?"],
    "portability": [],
    "locality": [{"prompt": "Who is Y?", "ground_truth": "Z", "metric": "m"}],
}
STRUCTURED = {
    "id": "s1",
    "input": "Who made X?",
    "prediction": "Al",
    "alternatives": ["Al", "Bo"],
    "output": [{"answer": "Al"}],
    "filtered_rephrases": ["Who made X?", "By whom was X made?"],
}
PORTABLE = ZSRE | {
    "portability": {"New Question": "Where was X's maker?", "New Answer": "Rome", "Other": "(Bo)"}
}
HALLUEDIT = {
    "topic": "rock",
    "subject": "X",
    "relation": "made of",
    "object": "basalt",
    "question": "What is X made of?",
    "output_m": "Granite",
    "eval_m": "0.0",
    "multiple_choices": "['a', 'b']",
    "paraphrased_question": "From what is X made?",
    "locality_question": "Where is X?",
    "question_2hop": "What mineral?",
    "answer_2hop": "Olivine, mostly",
    "question_3hop": "",
    "answer_3hop": "",
}
EVERY_LAYOUT = (
    *(COUNTERFACT, ZSRE, OWN, ROME, RECENT, WIKIBIO, KNOWEDIT_ZSRE, LISTS, STRUCTURED, PORTABLE),
    HALLUEDIT,
)
