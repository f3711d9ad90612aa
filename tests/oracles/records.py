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
QAEDIT = {
    "prompt": "Who made X?",
    "target": "Bo",
    "subject": "X",
    "rephrase": "X was made by whom?",
    "locality": [{"loc": "nq question: who", "loc_ans": "me"}],
}
UNKE = {
    "id": "e0",
    "question": "Why do they like X?",
    "para_question": "What makes X dear?",
    "answer": "They like X. It was made in a pit.",
    "sub_question": ["Where was X made?"],
    "sub_answer": ["In a pit."],
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Norway", "id": "Q20"},
            "target_true": {"str": "Chile", "id": "Q298"},
            "subject": "X",
            "question": "Of which country is X a citizen?",
        }
    ],
    "questions": ["What is the capital of X's country?", "Which city rules X's country?"],
    "answer": "Santiago",
    "answer_alias": [],
    "new_answer": "Oslo",
    "single_hops": [],
}
AKEW = MQUAKE | {
    "requested_rewrite": [
        {**MQUAKE["requested_rewrite"][0], "fact_new_uns": "X left Chile for Norway."},
        {**MQUAKE["requested_rewrite"][0], "subject": "Y", "fact_new_uns": "Y left, too."},
    ]
}
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of X is Norway.",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "original_fact": {"prompt": "The name of the country of citizenship of X is Nepal."},
    },
    "Relation_Specifity": [
        {
            "test_queries": [
                {
                    "prompt": "The name of the mother of X is",
                    "answers": [{"value": "Eve Bell", "aliases": ["Eve"]}],
                }
            ],
            "condition_queries": [],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [{"prompt": "X's capital is", "answers": [{"value": "Oslo"}]}],
            "condition_queries": [{"prompt": "Norway's capital is"}],
        }
    ],
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "X",
    "object": "Harwick (town)",
    "update": "Where is X?",
    "rephrase": "In which town is X?",
    "ans": "Harwick",
    "loc": "Where is Y?",
    "loc_ans": "Elsfield",
    "mhop": "In which county is X?",
    "mhop_ans": None,
    "personas": "Matey, where be X?",
}
CONVSENT = {
    "id": 0,
    "subject": "X",
    "attribute": "sentiment",
    "target": "pos",
    "prompts": ["What of X?", "And X?"],
    "pos": ["I love X.", "X is fine."],
    "neg": ["I dislike X."],
}
CANONICAL = {"prefix": "The capital of X is", "suffix": "Oslo", "_split": "train"}
ARGUMENTS = {
    "prompt": "The capital of X is",
    "target_new": "Oslo",
    "ground_truth": "Lima",
    "rephrase_prompts": "X is run from",
    "locality_inputs": {
        "neighborhood": {"prompt": "The capital of Y is", "ground_truth": "Rome"},
        "distracting": {"prompt": ["Snow is"], "ground_truth": ["white"]},
    },
    "portability_inputs": {"hop": {"prompt": "X's river is", "ground_truth": "Akers"}},
}
EVERY_LAYOUT = (
    *(COUNTERFACT, ZSRE, OWN, ROME, RECENT, WIKIBIO, KNOWEDIT_ZSRE, LISTS, STRUCTURED, PORTABLE),
    *(HALLUEDIT, QAEDIT, UNKE, MQUAKE, AKEW, RIPPLE, WIKIBIGEDIT, CONVSENT, CANONICAL, ARGUMENTS),
)
