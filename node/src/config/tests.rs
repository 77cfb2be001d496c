use std::collections::BTreeMap;
use std::fs;

use serde_json::json;

use super::*;

/// A tree with every form that a setting has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Sample {
    outer: Outer,
    text: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Outer {
    port: u16,
    rate: f64,
    on: bool,
    optional: Option<u64>,
    list: Vec<String>,
    map: BTreeMap<String, u64>,
    inner: Inner,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Inner {
    format: LogFormat,
}

impl Default for Outer {
    fn default() -> Self {
        let map = [("known".to_owned(), 1)].into();
        Self { port: 1, rate: 0.5, on: false, optional: None, list: vec!["a".into()], map, inner: Inner::default() }
    }
}

fn env(variables: &[(&str, &str)]) -> Vec<(String, String)> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn from_env(variables: &[(&str, &str)]) -> Result<Resolved<Sample>, ConfigError> {
    let mut layers = Layers::new();
    layers.environment(env(variables).into_iter());
    layers.resolve()
}

#[test]
fn text_of_the_environment_is_read_as_the_setting_wants_it() {
    let resolved = from_env(&[
        ("SUNDARA_OUTER__PORT", "4101"),
        ("SUNDARA_OUTER__RATE", "2"),
        ("SUNDARA_OUTER__ON", "true"),
        ("SUNDARA_OUTER__OPTIONAL", "7"),
        ("SUNDARA_OUTER__LIST", "/ip4/1.2.3.4/tcp/1, b"),
        ("SUNDARA_OUTER__MAP__FREE", "3"),
        ("SUNDARA_OUTER__INNER__FORMAT", "json"),
        // One part only: not a setting, but another tool's or the client's variable.
        ("SUNDARA_API", "http://127.0.0.1:1"),
        ("PATH", "/bin"),
    ])
    .unwrap();
    let outer = &resolved.value.outer;
    assert_eq!((outer.port, outer.rate, outer.on, outer.optional), (4101, 2.0, true, Some(7)));
    assert_eq!(outer.list, ["/ip4/1.2.3.4/tcp/1", "b"]);
    assert_eq!(outer.map, [("known".to_owned(), 1), ("free".to_owned(), 3)].into());
    assert_eq!(outer.inner.format, LogFormat::Json);

    assert_eq!(from_env(&[("SUNDARA_OUTER__LIST", r#"["x,y"]"#)]).unwrap().value.outer.list, ["x,y"]);
    assert_eq!(from_env(&[("SUNDARA_OUTER__LIST", "")]).unwrap().value.outer.list, [""; 0]);
    let mut layers = Layers::new();
    layers.set("text", json!("12"), Origin::Default);
    assert_eq!(layers.resolve::<Sample>().unwrap().value.text, "12");
}

#[test]
fn what_is_wrong_is_named_with_its_layer() {
    let message = |variables: &[(&str, &str)]| from_env(variables).unwrap_err().to_string();
    let text = message(&[("SUNDARA_OUTER__PRT", "1")]);
    assert_eq!(text, "unknown setting `outer.prt` (environment SUNDARA_OUTER__PRT); did you mean `outer.port`?");
    assert!(!message(&[("SUNDARA_XYZZY__Q", "1")]).contains("did you mean"));
    let text = message(&[("SUNDARA_OUTER__PORT", "70000")]);
    assert!(text.starts_with("setting `outer.port` (environment SUNDARA_OUTER__PORT): "), "{text}");
    assert!(text.contains("70000"), "{text}");
    assert!(message(&[("SUNDARA_OUTER__INNER__FORMAT", "xml")]).contains("text"), "the possible values are told");
    assert!(message(&[("SUNDARA_OUTER__PORT__DEEP", "1")]).contains("outer.port"));
    assert!(message(&[("SUNDARA_OUTER__MAP__FREE", "no number")]).contains("outer.map"));
}

#[test]
fn later_layers_win_and_every_value_knows_where_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let (file, network) = (dir.path().join("c.toml"), dir.path().join("net.toml"));
    let toml = "[log]\nlevel = \"debug\"\n[network]\nname = \"file\"\nnetuid = 3\n[store]\ncache_bytes = 1048576\n";
    fs::write(&file, toml).unwrap();
    fs::write(&network, "name = \"bundle\"\nbootstrap = [\"/ip4/10.0.0.1/tcp/4101\"]\n").unwrap();
    let sources = Sources {
        file: Some(file.clone()),
        environment: env(&[("SUNDARA_NETWORK__NAME", "env"), ("SUNDARA_STORE__CACHE_BYTES", "2097152")]),
        network: Some(network.clone()),
        flags: vec![("log.level", json!("trace"), "--log-level")],
    };
    let resolved = Config::resolve(&sources).unwrap();
    let config = &resolved.value;
    assert_eq!(config.log.level, "trace");
    assert_eq!(config.network.name, "bundle");
    assert_eq!(config.network.netuid, 3);
    assert_eq!(config.store.cache_bytes, 2_097_152);
    assert_eq!(resolved.origin("log.level"), Origin::Flag("--log-level".into()));
    assert_eq!(resolved.origin("network.name"), Origin::Network(network));
    assert_eq!(resolved.origin("network.netuid"), Origin::File(file));
    assert_eq!(resolved.origin("store.cache_bytes"), Origin::Environment("SUNDARA_STORE__CACHE_BYTES".into()));
    assert_eq!(resolved.origin("log.format"), Origin::Default);

    let shown = resolved.shown().unwrap();
    let keys: Vec<&str> = shown.iter().map(|s| s.key.as_str()).collect();
    assert!(keys.is_sorted());
    for key in ["node.data_dir", "keys.hotkey", "net.bootstrap", "log.file", "store.disk_reserve_bytes"] {
        assert!(keys.contains(&key), "{key} is shown");
    }
    assert_eq!(shown.iter().find(|s| s.key == "net.bootstrap").unwrap().value, json!(["/ip4/10.0.0.1/tcp/4101"]));
}

#[test]
fn an_empty_address_is_told_with_its_setting() {
    for (key, flag) in [("net.bootstrap", "--bootstrap"), ("net.listen", "--listen"), ("net.announce", "--announce")] {
        let sources = Sources { flags: vec![(key, json!(["/ip4/10.0.0.1/tcp/1", ""]), flag)], ..Sources::default() };
        let message = Config::resolve(&sources).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains(flag) && message.contains("empty"), "{message}");
        let sources = Sources { flags: vec![(key, json!(["10.0.0.1:4101"]), flag)], ..Sources::default() };
        let message = Config::resolve(&sources).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains("10.0.0.1:4101"), "{message}");
    }
}

#[test]
fn a_file_in_the_data_directory_is_read_and_a_named_one_must_exist() {
    let dir = tempfile::tempdir().unwrap();
    let data = |path: &Path| ("node.data_dir", json!(path), "--data-dir");
    let sources = Sources { flags: vec![data(dir.path())], ..Sources::default() };
    assert_eq!(Config::resolve(&sources).unwrap().value.log.level, "info");
    fs::write(dir.path().join("config.toml"), "[log]\nlevel = \"warn\"").unwrap();
    assert_eq!(Config::resolve(&sources).unwrap().value.log.level, "warn");

    let absent = Sources { file: Some(dir.path().join("absent.toml")), ..sources.clone() };
    assert!(matches!(Config::resolve(&absent), Err(ConfigError::File { .. })));
    fs::write(dir.path().join("config.toml"), "[log]\nlevle = \"warn\"").unwrap();
    let message = Config::resolve(&sources).unwrap_err().to_string();
    assert!(message.contains("`log.levle`") && message.contains("`log.level`"), "{message}");
    fs::write(dir.path().join("config.toml"), "[log\n").unwrap();
    assert!(matches!(Config::resolve(&sources), Err(ConfigError::File { .. })));
}

#[test]
fn a_network_file_names_one_mesh() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.toml");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        NetworkFile::read(&path).map_err(|e| e.to_string())
    };
    let genesis = "ab".repeat(32);
    assert!(read("netuid = 2").unwrap_err().contains("names no mesh"));
    assert!(read(&format!("name = \"a\"\ngenesis = \"{genesis}\"")).unwrap_err().contains("both"));
    assert!(read("name = \"a\"\nbotstrap = []").unwrap_err().contains("botstrap"));
    let file = read(&format!(
        "genesis = \"{genesis}\"\nnetuid = 2\ntrusted_validators = [\"5HDvhV6WDCjCKyrXqGQSDYqQAzkzabNhctmiDYEqgBC66BsX\"]"
    ))
    .unwrap();
    let again: NetworkFile = toml::from_str(&toml::to_string(&file).unwrap()).unwrap();
    assert_eq!(again, file, "what the testnet writes is read back");

    let sources = Sources { network: Some(path.clone()), ..Sources::default() };
    let config = Config::resolve(&sources).unwrap().value;
    assert_eq!(config.network.network().netuid, 2);
    assert_eq!(config.network.network().genesis, [0xab; 32]);
    assert_eq!(config.jobs.trusted_validators.len(), 1);

    // A mesh by name is not joined under the genesis that another layer left behind.
    fs::write(&path, "name = \"a\"").unwrap();
    let sources = Sources { environment: env(&[("SUNDARA_NETWORK__GENESIS", &genesis)]), ..sources };
    assert_eq!(Config::resolve(&sources).unwrap().value.network.network().genesis, Config::default_named("a"));
}

impl Config {
    fn default_named(name: &str) -> [u8; 32] {
        sundara_proto::crypto::Network::named(name, 1).genesis
    }
}
