//! `sundara-node reduce bench` as people start it.

use super::kit::{run, turn};

#[tokio::test(flavor = "multi_thread")]
async fn a_bench_of_rounds_checks_measures_and_survives_the_death_of_a_reducer() {
    let _turn = turn().await;
    let bench = ["reduce", "bench", "--members", "3", "--reducers", "2", "--size", "1MiB", "--rounds", "2"];
    let ran = run(&[&bench[..], &["--kill-reducer", "--json"]].concat()).await;
    let text = ran.ok();
    let report = ran.json();
    let mut at = 0;
    for key in ["wall_s", "algbw_gb_s", "cpu_s", "wire_bytes", "member_upload_bytes_max", "correct", "blamed"] {
        let found = text.find(&format!("\n  \"{key}\": ")).unwrap();
        assert!(found >= at, "{key} is out of its place in {text}");
        at = found;
    }
    assert_eq!((&report["correct"], &report["blamed"]), (&true.into(), &serde_json::json!([])));
    let [median, min, max] = ["median", "min", "max"].map(|key| report["wall_s"][key].as_f64().unwrap());
    assert!(0.0 < min && min <= median && median <= max, "{report}");
    assert!(report["error"].as_f64().unwrap() <= 6e-7, "{report}");
    // Three tensors go up, three sums come down; a little is added for each chunk.
    let wire = report["wire_bytes"].as_f64().unwrap() / f64::from(6 << 20);
    assert!((1.0..1.1).contains(&wire), "{report}");
    assert!(report["member_upload_bytes_max"].as_f64().unwrap() < 1.1 * f64::from(1 << 20), "{report}");
    assert!(report["kill"]["of_clean"].as_f64().unwrap() > 0.0, "{report}");

    let in_words = run(&[&bench[..], &["--compress", "int8", "--topology", "butterfly"]].concat()).await.ok();
    assert!(in_words.contains("\n  correct    yes; "), "{in_words}");
    let broadcast = run(&[&bench[..], &["--op", "broadcast", "--json"]].concat()).await.json();
    assert_eq!(broadcast["error"], 0.0, "{broadcast}");
    let senseless = run(&[&bench[..], &["--topology", "butterfly", "--kill-reducer"]].concat()).await;
    assert!(senseless.failed(2).contains("--kill-reducer"), "{senseless:?}");
}
